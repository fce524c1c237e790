"""What all stored weights have in common: their memory, and how a product with them is asked for."""

from torch import Tensor, dtype

from mqat.kernels.gemm import float_matmul


def _num_bytes(value: object) -> int:
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    if isinstance(value, tuple):
        return sum(map(_num_bytes, value))
    return value.num_bytes if isinstance(value, Stored) else 0


class Stored:
    """A weight's tensors, possibly nested in tuples or other `Stored`."""

    @property
    def num_bytes(self) -> int:
        """Memory held."""
        return sum(map(_num_bytes, vars(self).values()))


class CodeProduct(Stored):
    """A weight [O, I] that is multiplied with codes; nothing decodes it, so it has no gradients."""

    def multiply(self, x_NI: Tensor, scale: Tensor) -> Tensor:  # noqa: N803
        """`x @ w.T` of floats that are quantized here, [N, O] in their dtype; float32 step of x."""
        raise NotImplementedError


class FloatProduct(Stored):
    """A weight [O, I] that is multiplied with floats."""

    def decode(self, dtype: dtype) -> Tensor:
        """The weight that fake quantization gives, bit for bit."""
        raise NotImplementedError

    def multiply(self, x_NI: Tensor) -> Tensor:  # noqa: N803
        """`x @ w.T` in the dtype of x."""
        return float_matmul(x_NI, self.decode(x_NI.dtype).t(), x_NI.dtype)
