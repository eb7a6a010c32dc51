"""A stage of a model on one rank: the sizes that its operators are made of."""

from __future__ import annotations

from dataclasses import dataclass

from scmoe_ds.simulate.layout import Layout
from scmoe_ds.simulate.method import Method
from scmoe_ds.simulate.model import Experts, Model, Stage
from scmoe_ds.simulate.routing import distinct


@dataclass(frozen=True)
class Ground:
    """What an operator has to know."""

    model: Model
    stage: Stage
    method: Method
    layout: Layout

    @property
    def rows(self) -> float:
        """Tokens of a micro-batch."""
        return float(self.layout.micro_batch * self.stage.tokens)

    @property
    def width(self) -> int:
        """Bytes of an element of activations and weights."""
        return 4 if self.layout.precision == "fp32" else 2

    @property
    def tp(self) -> int:
        """Ranks that share a layer."""
        return self.layout.tensor_parallel

    @property
    def rms(self) -> bool:
        return self.stage.norm == "rms"

    @property
    def dropout(self) -> float:
        """Of what a branch adds."""
        return self.model.dropout if self.layout.training else 0.0

    @property
    def row_bytes(self) -> float:
        """Of all tokens of a micro-batch, once."""
        return self.rows * self.stage.hidden * self.width

    @property
    def values(self) -> int:
        """Size of a head's values."""
        return self.stage.value_dim or self.stage.head_dim

    @property
    def experts(self) -> Experts:
        """Of this stage's MoEs."""
        assert self.stage.experts is not None
        return self.stage.experts

    @property
    def adds_shared(self) -> bool:
        """Whether the method adds a shared expert to a model that has none."""
        without = self.method.architecture == "topk" or not self.method.adds_shared
        return not (without or self.experts.shared_hidden)

    @property
    def shared_hidden(self) -> int:
        """Width inside the shared expert, the model's or the method's; 0: there is none."""
        if self.adds_shared:
            return self.method.shared_hidden or self.experts.hidden
        return self.experts.shared_hidden

    @property
    def routed(self) -> int:
        """Routed experts per token."""
        if self.method.routed is not None:
            return self.method.routed
        return max(self.experts.top_k - 1, 1) if self.adds_shared else self.experts.top_k

    @property
    def coefficients(self) -> int:
        """Outputs of the network that weights shared and routed outputs."""
        if not self.adds_shared:
            return 0
        # DeepSpeed's Residual MoE has two.
        return 2 if self.method.layer == "deepspeed" else {"add": 0, "cg1": 1, "cg2": 2}[self.method.merge]

    @property
    def expert_tp(self) -> int:
        """Ranks that share a routed expert."""
        return self.tp if self.layout.expert_tensor_parallel else 1

    @property
    def slices(self) -> int:
        """Tensor-parallel ranks that each send a slice of the same tokens."""
        return 1 if self.layout.expert_tensor_parallel else self.tp

    @property
    def choices(self) -> int:
        """Rows of a token: one for each part of its routed experts."""
        return self.routed * self.method.parts

    @property
    def places(self) -> int:
        """What rows are sent to, of all ranks: routed experts, or their parts."""
        return self.experts.num_experts * self.method.parts

    @property
    def inner(self) -> float:
        """Width inside a routed expert, or a part of one, on a rank."""
        return self.experts.hidden / self.method.parts / self.expert_tp

    @property
    def local_experts(self) -> float:
        """Routed experts on a rank, or parts of them."""
        return self.places / self.layout.expert_parallel

    @property
    def capacity(self) -> int:
        """Rows of a padded buffer."""
        chosen = self.rows * self.routed / self.experts.num_experts
        usual = 1.25 if self.model.images else 2.0
        factor = (self.method.capacity_factor or usual) if self.method.drop_tokens else 1.0
        rows = max(-int(-chosen * factor // 1), self.method.min_capacity if self.method.drop_tokens else 1)
        # This package knows that no expert gets a token twice; DeepSpeed's own buffers may be larger than all tokens.
        return rows if self.method.layer == "deepspeed" else min(rows, int(self.rows))

    @property
    def sent(self) -> float:
        """Rows that a rank sends, for its own experts among them; and with even routing, that its experts compute."""
        padded = self.method.dispatch == "padded"
        choices = self.capacity * self.places if padded else self.rows * self.choices
        return choices / self.slices

    @property
    def one_row_per_rank(self) -> bool:
        """Whether exact rows are tokens, one for each rank with any of their experts, and not choices."""
        exact = self.method.layer == "scmoe_ds" and self.method.dispatch == "exact"
        return exact and self.choices > 1 and self.layout.expert_parallel > 1 and self.slices == 1

    @property
    def copies(self) -> float:
        """Rows that really leave, with even routing."""
        if not self.one_row_per_rank:
            return self.sent
        return self.rows * distinct(
            self.layout.expert_parallel, self.experts.num_experts, self.routed, self.method.parts
        )
