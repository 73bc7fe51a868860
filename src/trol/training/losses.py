"""The losses of a stage: the host's own, and the exit loss.

The exit loss teaches a stack to be left early: each layer's output is read as if the last.
"""

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers import TrainerCallback

from trol.depth import attached
from trol.depth.attachment import gates_of
from trol.depth.readout import Readout
from trol.depth.roles import IGNORED_LABEL
from trol.errors import HostError, UsageError
from trol.training.recipe import Stage


def final_loss(model: Any, **inputs: Any) -> Tensor:
    """The host's own loss: that of its last layer's output."""
    return model(use_cache=False, **inputs).loss


def weights(layers: int, scale: float) -> list[float]:
    """e(l) = scale * sum_{i<=l} i, and of the last layer L - 1 + scale * sum_{i<=L-2} i.

    LayerSkip (https://arxiv.org/abs/2404.16710, equation 6).
    """
    early = [scale * layer * (layer + 1) / 2 for layer in range(layers - 1)]
    return [*early, layers - 1 + scale * (layers - 2) * (layers - 1) / 2]


@dataclass
class ExitLoss(TrainerCallback):
    """J = sum_l C(t, l) e(l) CE(head(norm(x_{l+1})), labels) / sum_l C(t, l) e(l).

    LayerSkip (https://arxiv.org/abs/2404.16710, section 4.1.2): x_{l+1} is what leaves layer l, C
    says which exits learn at step t, the last layer always does. e(0) = 0, so that the first layer
    is not taught. Where the attached policy has trained exit heads, exits are before the layers
    that carry one, and x goes through it first. What the host adds to its own loss stays as it is.
    As a callback of Trainer, the loss learns which step it is.
    """

    scale: float
    """How much the early exits count, beside the last layer."""
    curriculum: str = "none"
    """One of `trol.training.recipe.CURRICULA`."""
    every: int = 1
    """Only each `every`-th exit learns."""
    step: int = 0
    """t, in optimiser steps."""
    steps: int = 1
    """Optimiser steps of the whole stage."""

    def __call__(self, model: Any, **inputs: Any) -> Tensor:
        """The loss of a batch with `labels` [B, T]; a mean over answer tokens.

        Raises:
            HostError: the host shows no hidden states.
            UsageError: the stack has too few layers.
        """
        host, stack = attached(model)
        output = model(use_cache=False, output_hidden_states=True, **inputs)
        states, layers = output.hidden_states, stack.depth_layers
        if states is None or len(states) != layers + 1:
            raise HostError(
                f"{type(host).__name__} does not show what leaves each of its {layers} layers, "
                "which the exit loss reads; set exit_loss to 0."
            )
        answers = _Answers(inputs["labels"], inputs.get("num_items_in_batch"))
        shares = weights(layers, self.scale)
        last, total = answers.loss(answers.of(output.logits)), shares[-1]
        read, heads = Readout(host), gates_of(stack) if stack.depth_policy.translates else None
        loss = 0.0
        for layer in self.enabled(exits_of(stack)):
            state = answers.of(states[layer + 1])
            head = None if heads is None else heads[layer + 1]
            early = answers.loss(read(state if head is None else head(state)))
            loss, total = loss + shares[layer] * (early - last), total + shares[layer]
        # output.loss is `last`, with what the host and the policy add to it.
        return output.loss + loss / total

    def enabled(self, exits: list[int]) -> list[int]:
        """The exits that learn at this step, beside the last layer."""
        count = len(exits)
        if self.curriculum == "rotational":
            turn = min(self.every, count)
            return [layer for place, layer in enumerate(exits) if (place - self.step) % turn == 0]
        if self.curriculum == "gradual":
            count = min(count, 1 + 2 * count * self.step // max(self.steps, 1))
        return exits[::-1][:count][:: self.every][::-1]

    def on_step_begin(self, _: Any, state: Any, *__: Any, **___: Any) -> None:
        """Takes over the step from Trainer."""
        self.step, self.steps = state.global_step, state.max_steps


def exit_loss(learner: Any, stage: Stage) -> ExitLoss | None:
    """The stage's exit loss, if it wants one.

    Raises:
        UsageError: the learner has no exits.
    """
    if not stage.exit_loss:
        return None
    exits_of(attached(learner)[1])
    return ExitLoss(stage.exit_loss, stage.exit_curriculum, stage.exit_every)


def exits_of(stack: Any) -> list[int]:
    """The layers before the last one whose outputs can be taught to be the last.

    Raises:
        UsageError: there is none.
    """
    gates, policy = gates_of(stack), stack.depth_policy
    inner = range(1, stack.depth_layers - 1)
    exits = [i for i in inner if not policy.translates or gates[i + 1] is not None]
    if not exits:
        raise UsageError(
            f"exit_loss teaches exits behind layers 1 to L - 2, and this stack of "
            f"{stack.depth_layers} layers with {policy} has none there; take a deeper model, or "
            "set exit_loss to 0."
        )
    return exits


class _Answers:
    """The places of a batch that predict an answer token, and the tokens that follow them."""

    def __init__(self, labels: Tensor, items: Tensor | int | None) -> None:
        self.chosen = labels[:, 1:] != IGNORED_LABEL
        self.labels, self.items = labels[:, 1:][self.chosen], items

    def of(self, states: Tensor) -> Tensor:
        """The states or logits at these places. Shape: [B, T, D] -> [N, D]."""
        return states[:, :-1][self.chosen.to(states.device)]

    def loss(self, logits: Tensor) -> Tensor:
        """Cross-entropy, as transformers takes it: a mean, or this part's share of a batch's."""
        how = "mean" if self.items is None else "sum"
        labels = self.labels.to(logits.device)
        total = nn.functional.cross_entropy(logits.float(), labels, reduction=how)
        return total if self.items is None else total / self.items
