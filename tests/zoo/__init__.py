"""Models of the world, small, and whether their derivatives, trainers and monitors are right here.

`python -m tests.zoo.run` runs it; it goes on where it stopped. `docs/zoo.md` is its table.
"""
