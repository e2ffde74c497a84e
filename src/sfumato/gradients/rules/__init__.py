"""How each torch function's parameters get their per-record gradients, one file a family of layers."""

from sfumato.gradients.rules import attention, convolution, embedding, linear, loss, normalization, questions, recurrent
from sfumato.gradients.rules.otherwise import otherwise
from sfumato.gradients.rules.registry import RULES, TOGETHER

__all__ = [
    "RULES", "TOGETHER", "attention", "convolution", "embedding", "linear", "loss", "normalization", "otherwise", "questions",
    "recurrent",
]  # fmt: skip
