"""The kernels on torch. `backend.py` holds their class, and the other files what it needs."""
