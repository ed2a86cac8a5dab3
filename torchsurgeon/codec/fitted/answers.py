"""How much a model's answer depends on a tensor: the scalar whose gradient says so.

The metric is the Fisher matrix: the mean of g gᵀ, where g is the gradient of the log-likelihood of an answer that is
drawn from the model's own output. Half of dᵀ F d is then how far the distribution of answers moves (in nats, as
Kullback-Leibler divergence) when the tensor changes by a small d. For outputs that are no classes, each output value
counts as normally distributed around the model's own with the deviation that this output has in the sample.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from torchsurgeon.errors import CodecError, short
from torchsurgeon.tracing.graph import LayerGraph

AnswerKind = Literal["classes", "values"]

# Answers surer than this are tempered: they have almost no gradient, and would leave the metric to a few unsure inputs.
_MOST_CONFIDENCE = 0.9
_TEMPERATURES = (1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 16.0)
_NOT_FINITE = "the model must give finite answers for the sample; it gives NaN or infinity; leave such inputs out"


class Answers:
    """Makes the scalar whose gradient says how much the answer depends on a boundary.

    Attributes:
        draws: how many scalars are drawn for each input.
        classes_at: the dimension of classes in the first output; None where the outputs are values.
    """

    def __init__(self, graph: LayerGraph, answers: AnswerKind | None, classes_at: int, draws: int, seed: int) -> None:
        first = graph.outputs[0]
        single = len(graph.outputs) == 1 and len(first.shape) == 2 and first.shape[1] > 1
        if answers is None:
            answers = "classes" if single and first.dtype.is_floating_point else "values"
        rank = len(first.shape)
        if answers == "classes" and not (-rank <= classes_at < rank and first.dtype.is_floating_point):
            raise CodecError(
                f"classes_at must be a dimension of the output {short(str(first), quote=False)}, which must be "
                f'floating-point; got {short(classes_at)}; give answers="values" where there are no classes'
            )
        self.draws, self.classes_at = draws, classes_at if answers == "classes" else None
        self._generator = torch.Generator().manual_seed(seed)
        self._deviations: list[float] | None = None

    def scalar(self, outputs: Sequence[Tensor]) -> Tensor | None:
        """Return the scalar of another draw; None where no output can be differentiated.

        Raises:
            CodecError: an answer is not finite. Single classes may have logits of -inf.
        """
        if self.classes_at is not None:
            return _class_scores(outputs[0], self.classes_at, self._generator) if outputs[0].requires_grad else None
        real = [out for out in outputs if out.requires_grad and out.is_floating_point() and out.numel()]
        if not real:
            return None
        if not all(bool(torch.isfinite(out).all()) for out in real):
            raise CodecError(_NOT_FINITE)
        if self._deviations is None or len(self._deviations) != len(real):
            self._deviations = [float(out.detach().float().std(correction=0)) for out in real]
        return _random_values(real, self._deviations, self._generator)

    def divergence(self, own: Sequence[Tensor], others: Sequence[Tensor]) -> Tensor | None:
        """Return how far answers are from the model's own, in nats for each input; None where nothing can be learned.

        Of classes it is the Kullback-Leibler divergence. Values count as normally distributed, with the deviation that
        the own ones have here.

        Args:
            own: the model's own outputs.
            others: the outputs whose distance is asked for, of which at least one must need a gradient.
        """
        if self.classes_at is not None:
            if not others[0].requires_grad:
                return None
            pair = [one.movedim(self.classes_at, -1).float().log_softmax(-1) for one in (own[0], others[0])]
            odds = pair[0].exp()
            # Classes ruled out by -inf cannot differ.
            terms = torch.where(odds > 0, odds * (pair[0] - pair[1]), 0.0)
            return terms.sum(-1).mean()
        pairs = [
            (a, b) for a, b in zip(own, others, strict=True) if b.requires_grad and a.shape == b.shape and a.numel()
        ]
        if not pairs:
            return None
        errors = [(a.float() - b.float()).square().mean() / (a.float().var(correction=0) + 1e-12) for a, b in pairs]
        return torch.stack(errors).sum() / 2


def _class_scores(scores: Tensor, dim: int, generator: torch.Generator) -> Tensor:
    """Return the log-likelihood, summed up, of classes that are drawn from the model's own output.

    Args:
        scores: logits.
        dim: the dimension of classes.
        generator: what the draws come from.
    """
    scores = scores.movedim(dim, -1).float()
    with torch.no_grad():
        temperature = torch.full_like(scores[..., :1], _TEMPERATURES[-1])
        for tried in reversed(_TEMPERATURES):
            confidence = (scores / tried).softmax(-1).amax(-1, keepdim=True)
            temperature = torch.where(confidence <= _MOST_CONFIDENCE, tried, temperature)
        odds = (scores / temperature).softmax(-1).reshape(-1, scores.shape[-1])
        # Not of logits with NaN or infinity. Single classes ruled out by -inf do no harm.
        if not bool(torch.isfinite(odds).all()):
            raise CodecError(_NOT_FINITE)
        drawn = torch.multinomial(odds.cpu(), 1, generator=generator).to(scores.device)
    likelihoods = (scores / temperature).log_softmax(-1).reshape(-1, scores.shape[-1])
    return likelihoods.gather(1, drawn).sum()


def _random_values(outputs: Sequence[Tensor], deviations: Sequence[float], generator: torch.Generator) -> Tensor:
    """Return outputs summed up with random weights, whose gradient has the metric of normally distributed values.

    Args:
        outputs: the floating-point outputs.
        deviations: the deviation of each in the sample.
        generator: what the weights come from.
    """
    total = outputs[0].new_zeros((), dtype=torch.float32)
    for output, deviation in zip(outputs, deviations, strict=True):
        weights = torch.randn(output.shape, generator=generator).to(output.device)
        # As a mean over an output's values, so that neither long outputs nor many count more.
        each = output[:1].numel() if output.dim() else 1
        total = total + (output.float() * weights).sum() / (deviation or 1.0) / each**0.5
    return total
