"""Losses as modules: they hold options, and a weight of the classes where one is given."""

from __future__ import annotations

from torch import Tensor, nn

from fastattn.ops.cross_entropy import cross_entropy, linear_cross_entropy


class CrossEntropyLoss(nn.Module):
    """`fastattn.cross_entropy` as a module, in the place of `torch.nn.CrossEntropyLoss`.

    Its classes are the last dimension; torch's are the second. Up to two dimensions these are one.

    Args:
        weight: of the classes, ``[V]``; kept as a buffer.
        ignore_index, reduction, label_smoothing, softcap, z_loss: as those of `fastattn.cross_entropy`.

    Source: as `fastattn.cross_entropy`.

    Example:
        >>> import torch, fastattn
        >>> fastattn.nn.CrossEntropyLoss(label_smoothing=0.1)(torch.zeros(2, 4), torch.tensor([1, 2]))
        tensor(1.3863)
    """

    weight: Tensor | None

    def __init__(
        self,
        weight: Tensor | None = None,
        *,
        ignore_index: int = -100,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
        softcap: float | None = None,
        z_loss: float = 0.0,
    ) -> None:
        super().__init__()
        self.register_buffer("weight", weight)
        self.ignore_index = ignore_index
        self.reduction = reduction
        self.label_smoothing = label_smoothing
        self.softcap = softcap
        self.z_loss = z_loss

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        """The loss.

        Args:
            logits: ``[..., V]``.
            target: int64 ``[...]``.

        Returns:
            A scalar, or ``[...]`` with reduction ``"none"``.

        Raises:
            ValueError: what `fastattn.cross_entropy` refuses, and logits above two dimensions whose shape
                does not tell whether they are ``[..., V]`` or torch's ``[N, V, ...]``.
        """
        if logits.dim() > 2 and logits.shape[1:-1] == logits.shape[2:]:
            raise ValueError(
                "logits: expected a shape that tells [..., V] from torch's [N, V, ...], "
                f"got {list(logits.shape)}: flatten logits to [N, V] and target to [N]"
            )
        return cross_entropy(
            logits,
            target,
            self.weight,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            label_smoothing=self.label_smoothing,
            softcap=self.softcap,
            z_loss=self.z_loss,
        )

    def extra_repr(self) -> str:
        """The options, as printing the module shows them."""
        return _options(self)


class LinearCrossEntropyLoss(nn.Module):
    """`fastattn.linear_cross_entropy` as a module: a model's head and loss without the logits.

    It holds no parameters: the head's weight is given with each call, and may be tied to the embedding.

    Args:
        ignore_index, reduction, label_smoothing, softcap, z_loss: as `fastattn.linear_cross_entropy` has.

    Source: as `fastattn.linear_cross_entropy`.

    Example:
        >>> import torch, fastattn
        >>> head = torch.nn.Linear(3, 4)
        >>> loss = fastattn.nn.LinearCrossEntropyLoss()
        >>> loss(torch.randn(2, 3), head.weight, torch.tensor([1, 2]), head.bias).shape
        torch.Size([])
    """

    def __init__(
        self,
        *,
        ignore_index: int = -100,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
        softcap: float | None = None,
        z_loss: float = 0.0,
    ) -> None:
        super().__init__()
        self.ignore_index = ignore_index
        self.reduction = reduction
        self.label_smoothing = label_smoothing
        self.softcap = softcap
        self.z_loss = z_loss

    def forward(self, x: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None = None) -> Tensor:
        """The loss.

        Args:
            x: ``[..., D]``.
            weight: ``[V, D]``.
            target: int64 ``[...]``.
            bias: ``[V]``.

        Returns:
            A scalar, or ``[...]`` with reduction ``"none"``.
        """
        return linear_cross_entropy(
            x,
            weight,
            target,
            bias,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            label_smoothing=self.label_smoothing,
            softcap=self.softcap,
            z_loss=self.z_loss,
        )

    def extra_repr(self) -> str:
        """The options, as printing the module shows them."""
        return _options(self)


def _options(module: CrossEntropyLoss | LinearCrossEntropyLoss) -> str:
    names = ("ignore_index", "reduction", "label_smoothing", "softcap", "z_loss")
    return ", ".join(f"{name}={getattr(module, name)!r}" for name in names)
