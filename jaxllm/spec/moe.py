"""Mixture of experts as data: who is chosen, with what weight, and what an expert is."""

from __future__ import annotations

import dataclasses
from typing import ClassVar, Literal

from jaxllm.core.config import require
from jaxllm.spec.mlp import MLP

__all__ = ["MoE", "Router"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Router:
    """How A of E experts are chosen for a token and weighted; all of it in float32.

    Attributes:
      score: of the logits x W: `softmax` over all experts, or `sigmoid` of each.
      over_chosen: softmax over the chosen experts alone, in place of over all.
      renormalize: the chosen experts' weights are divided by their sum.
      scale: factor on the weights, after that.
      groups: into how many neighbourhoods of equal size the experts are cut.
      groups_kept: experts of so many groups, the best ones, may be chosen.
      group_score: of a group: the sum of its two largest scores (`two`) or its largest (`one`).
      bias: on the logits.
      balance_bias: on the scores while experts and groups are chosen, not on the weights. It has no
        gradient: training moves it so that loads become equal. Source: arXiv 2408.15664.
      weigh_inputs: the weight multiplies what goes into an expert in place of what comes out.
    """

    score: Literal["softmax", "sigmoid"] = "softmax"
    over_chosen: bool = False
    renormalize: bool = False
    scale: float = 1.0
    groups: int = 1
    groups_kept: int = 1
    group_score: Literal["two", "one"] = "two"
    bias: bool = False
    balance_bias: bool = False
    weigh_inputs: bool = False

    def __post_init__(self) -> None:
        require(self.scale > 0, f"router: scale is positive, found {self.scale}")
        require(
            1 <= self.groups_kept <= self.groups,
            f"router: groups_kept is 1 to groups = {self.groups}, found {self.groups_kept}",
        )
        require(
            not self.over_chosen or self.score == "softmax",
            "router: over_chosen is for softmax; a sigmoid looks at one expert anyhow",
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class MoE:
    """Each token goes to `active` of `experts` MLPs, whose updates are summed by weight.

    Experts that all tokens share are an `MLP` beside this op in the same residual update.
    Source: arXiv 1701.06538, 2101.03961.

    Attributes:
      experts: E.
      active: A, experts of a token.
      mlp: one expert.
      router: how they are chosen.
      latent: width that tokens are projected to for the experts, and their sum back from; None: the
        experts work on the model's width.
      latent_bias: on these two projections.
    """

    kind: ClassVar[str] = "moe"
    experts: int
    active: int
    mlp: MLP
    router: Router = Router()
    latent: int | None = None
    latent_bias: bool = False

    def __post_init__(self) -> None:
        groups = self.router.groups
        require(self.experts >= 1, f"moe: experts is positive, found {self.experts}")
        require(
            self.experts % groups == 0,
            f"moe: experts {self.experts} is no multiple of the router's groups {groups}",
        )
        size = self.experts // groups
        most = size * self.router.groups_kept
        require(
            1 <= self.active <= most,
            f"moe: active is 1 to {most}, the experts that may be chosen; found {self.active}",
        )
        require(
            groups == 1 or self.router.group_score == "one" or size >= 2,
            f"moe: {groups} groups of {self.experts} experts have no two largest scores; "
            "take group_score 'one'",
        )
        require(
            self.latent is None or self.latent >= 1,
            f"moe: latent is positive, found {self.latent}",
        )
        require(
            self.latent is not None or not self.latent_bias,
            "moe: latent_bias is of the projections to and from a latent width; give latent",
        )
        require(
            not self.mlp.out_gate, "moe: an expert has no out_gate; the router weighs its update"
        )
        require(self.mlp.adapter_rank is None, "moe: an expert has no adapter_rank")
