"""The kernels on TensorFlow. `backend.py` holds their class, and the other files what it needs."""
