"""The base class of all attacks."""

from typing import Any, Self

from keras_gradtools.annotations import Function, Nested, Tensor


class Attack:
    """Options that Keras can serialize, and `perturb` for use in a training step.

    Two attacks are equal if they have the same class and the same options.
    """

    @property
    def name(self) -> str:
        return type(self).__name__

    def perturb(self, model: Function, x: Nested, y: Nested, seed: Any = None) -> Tensor:
        """The perturbed examples as constants. Can be called inside a compiled function."""
        raise NotImplementedError

    def get_config(self) -> dict[str, Any]:
        raise NotImplementedError

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Self:
        return cls(**config)

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and self.get_config() == other.get_config()

    def __hash__(self) -> int:
        return hash(repr(self))

    def __repr__(self) -> str:
        return f"{self.name}({', '.join(f'{k}={v!r}' for k, v in self.get_config().items())})"
