"""The kernels on JAX. `backend.py` holds their class, and the other files what it needs."""
