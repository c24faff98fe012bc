"""What all attacks are: options, and a perturbation of a batch inside a training step."""


class Attack:
    """Options that Keras can save, which attacks are equal by, and `perturb`."""

    @property
    def name(self):
        return type(self).__name__

    def perturb(self, model, x, y, seed=None):
        """The perturbed examples, constants, inside a computation that something else compiles."""
        raise NotImplementedError

    def get_config(self):
        raise NotImplementedError

    @classmethod
    def from_config(cls, config):
        return cls(**config)

    def __eq__(self, other):
        return type(self) is type(other) and self.get_config() == other.get_config()

    def __hash__(self):
        return hash(repr(self))

    def __repr__(self):
        return f"{self.name}({', '.join(f'{k}={v!r}' for k, v in self.get_config().items())})"
