"""Runs steps of one model on one device: owns the ops and the KV pool, and packs sets of weights for `HeldSets`.

    made -> stage(tensors, version) -> commit() -> execute() ... stage(...) -> commit() -> execute() ...

Staging packs a complete set beside the live one; committing only moves a reference.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from zerokl.kernels.dispatch import (
    device_packer,
    embeds_from_head,
    forget_step,
    get_ops,
    host_storage,
    release_spare_weights,
    weight_packer,
)
from zerokl.kernels.ops import DecoderParams, KVPool, StepInputs
from zerokl.rollout.expert_parallel.placement import ExpertPlacement
from zerokl.rollout.expert_parallel.rank_place import RankPlace
from zerokl.rollout.expert_parallel.rearrange import rearrange
from zerokl.rollout.gpu_steps import make_gpu_steps
from zerokl.rollout.held_sets import HeldSets, WeightSet
from zerokl.rollout.host_steps import HostSteps
from zerokl.rollout.models.config import ModelConfig
from zerokl.rollout.models.decoder import DecoderSpec
from zerokl.rollout.models.decoder_params import Previous, build_params, held_tensors
from zerokl.rollout.models.loader import check_tensors
from zerokl.rollout.models.rope import rope_table
from zerokl.rollout.spill import HostedSets, SpilledSets
from zerokl.rollout.step_order import StepOrder, StepResult
from zerokl.rollout.step_outcome import IdleStep, PendingGpuStep, PendingStep
from zerokl.weight_sync.views import Overlay

if TYPE_CHECKING:
    from zerokl.kernels.communicator import Communicator
    from zerokl.kernels.device_tensors import DeviceTensors
    from zerokl.kernels.gpu.device_packing import Place
    from zerokl.rollout.config import EngineConfig


class ModelRunner:
    """One model, one KV pool, several sets of weights. One thread calls; `stage` may run beside it."""

    def __init__(self, config: EngineConfig, model_config: ModelConfig, place: RankPlace | None = None) -> None:
        """Make the ops and allocate the KV pool; no weights yet.

        Of `config`, which must be resolved, `device`, `gpus`, `num_threads`, `block_size`, `num_blocks`,
        `max_model_len` and `return_routing` count. `place` is this rank's among others; None: it is alone. Raises
        ValueError for a model or device that cannot be spread so.
        """
        assert config.num_blocks is not None, "an unresolved EngineConfig"
        num_threads = config.num_threads or len(os.sched_getaffinity(0))
        self._config = model_config
        self._spec = DecoderSpec.from_config(model_config)
        self._device = config.device
        self._place = RankPlace() if place is None else place
        self._placement = self._place.initial_placement(model_config)
        self._ops = get_ops(config.device, num_threads, config.dtype, config.gpu_of(self._place.rank))
        self._place.prepare(self._ops)
        self._gpu_steps = make_gpu_steps(config, self._ops, self._spec, model_config.moe)
        self._return_routing = config.return_routing != "none"
        self._host_steps = HostSteps(self._ops, self._spec, model_config.moe, returns_routing=self._return_routing)
        self._make_pool = partial(
            self._ops.kv_pool,
            model_config.num_hidden_layers,
            config.num_blocks,
            config.block_size,
            self._spec.attention,
        )
        self._pool: KVPool[Any] | None = self._make_pool()
        positions = config.max_model_len or model_config.max_position_embeddings
        self._rope = self._ops.tensor(rope_table(model_config.rope, model_config.head_dim, positions))
        self._sets = HeldSets()

    @property
    def weight_sets(self) -> Mapping[str, WeightSet]:
        """The committed sets by name: "policy" once there was a commit, and the pinned ones."""
        return self._sets.committed

    @property
    def takes_patterns(self) -> bool:
        """Whether `stage` is best given bfloat16 as it is: the device keeps it so."""
        return self._gpu_steps is not None

    @property
    def placement(self) -> ExpertPlacement | None:
        """Where experts are; None where each rank has all."""
        return self._placement

    def execute(self, order: StepOrder) -> StepResult:
        """Run one step with the set `inputs.policy`; the result has a row per logit row and is the caller's to keep.

        Every rank of the place executes an order of the same step, one without tokens if need be: the others need its
        experts. An error other than those below may leave them waiting until the communicator is closed.

        Raises ValueError when there is no such set, NonFiniteLogitsError naming step and rows when a distribution is
        broken (keys and values of the step are written then).
        """
        if self._gpu_steps is not None:
            return self.begin(order).result()
        weights, pool = self._operands(order.inputs)
        self._place.begin_step(order, pool)
        return self._host_steps.run(weights.params, order.inputs, pool)

    def begin(self, order: StepOrder) -> PendingStep:
        """`execute` on a GPU without waiting: further steps may be begun before the result is asked for.

        Results are to be asked for in the order of the steps, and before weights or pool change.
        """
        assert self._gpu_steps is not None, f"steps on device {self._device!r} do not overlap"
        assert not order.has_moves, "blocks are handed over between ranks on the CPU alone"
        weights, pool = self._operands(order.inputs)
        if not len(order.inputs.token_ids):
            return IdleStep(order.inputs, self._config.moe if self._return_routing else None)
        fetched = self._gpu_steps.begin(weights.place, weights.params, order.inputs, pool)
        return PendingGpuStep(fetched, order.inputs, self._config.moe)

    def _operands(self, inputs: StepInputs) -> tuple[WeightSet, KVPool[Any]]:
        weights = self._sets.named(inputs.policy)
        if self._pool is None:
            raise ValueError("there is no KV pool: it is asleep")
        return weights, self._pool

    def warm_up(self) -> None:
        """Before the first step, where the device gains by it: compile kernels and record steps."""
        live = self._sets.live
        if self._gpu_steps is not None and self._pool is not None and live is not None:
            self._gpu_steps.warm_up(live.place, live.params, self._pool)

    def stage(self, tensors: Mapping[str, Any], version: int = 0, *, delta: bool = False) -> None:
        """Pack a set of weights beside the live one, in place of what was staged before.

        May run in another thread than `execute`. `tensors` maps Hugging Face names to float32 NumPy arrays (read-only
        ones will do) or `kernels.row_stream.RowStream`s; a mapping that reads on access, such as
        `models.loader.open_tensors` gives (of bfloat16 patterns too), keeps the peak of memory low. Everything kept is
        a copy: the sources may be overwritten afterwards. With `delta` they are those that differ from the live set's,
        and what was packed of the others is shared with it. All names and shapes are checked, but experts of other
        ranks are not read. Raises ValueError naming missing, extra or misshapen tensors, and one that holds a NaN or an
        infinity; nothing is staged then.
        """
        self._sets.discard_staged()
        live = self._sets.live
        previous = None
        if delta:
            assert live is not None, "a delta without live weights"
            previous = Previous(params=live.params, changed=frozenset(tensors))
            tensors = Overlay(tensors, self.live_tensors())
        else:
            check_tensors(tensors, self._config)
        if self._gpu_steps is not None:
            release_spare_weights(self._ops)  # what is packed here has memory of its own
        packer, operands = weight_packer(self._ops, tensors)
        params = build_params(
            packer,
            self._config,
            operands,
            self._rope,
            keep=packer.tensor,
            previous=previous,
            share=self._place.share(self._placement),
            embeds_from_head=embeds_from_head(self._ops),
        )
        self._sets.stage(params, version)

    def stage_device(self, tensors: DeviceTensors, place: Place, version: int) -> dict[str, int]:
        """`stage` of a complete set in a GPU's memory, by copies on the device, which `place` does; otherwise as it.

        Returns, once all are done, the checksums of what came to its place, by name, for the caller to compare. The
        same object as the last time stands for the same tensors at the same addresses.
        """
        self._sets.discard_staged()
        packer = device_packer(self._ops, place)

        def pack() -> DecoderParams[Any]:
            check_tensors(tensors, self._config)
            return build_params(packer, self._config, tensors, self._rope, keep=packer.tensor)

        try:
            params, checksums = packer.fill(tensors, pack)
        except BaseException:
            packer.abandon()
            raise
        self._sets.stage(params, version, home=packer.use)
        return checksums

    def live_tensors(self) -> Mapping[str, Any]:
        """What the live set was packed of, unpacked on access; of the experts, those that this rank holds.

        Raises ValueError where the device cannot.
        """
        if self._device != "cpu":
            raise ValueError(f"device {self._device!r} cannot read packed weights back: publish all tensors")
        from zerokl.rollout.models.packed_tensors import PackedTensors

        live = self._sets.live
        assert live is not None, "no live weights"
        return PackedTensors(live.params, self._config, self._place.share(self._placement))

    def held_tensors(self) -> Collection[str]:
        """Names of the tensors that this rank packs: all but the experts of other ranks."""
        return held_tensors(self._config, self._place.share(self._placement))

    def rearrange_experts(self, placement: Any) -> None:
        """Have each expert where `placement`, int32 [M, E, S], wants it, in every set; no output changes a bit.

        Copied from the ranks that hold them now. Every rank of the group calls it between the same two steps, and none
        while it stages. Raises ValueError for a placement that does not fit, where each rank has all experts, and while
        the weights are asleep; nothing is sent then.
        """
        old, moe = self._placement, self._config.moe
        if old is None or moe is None:
            raise ValueError("rearrange_experts needs expert_parallel_size above 1, got 1")
        if self._sets.are_asleep:
            raise ValueError("rearrange_experts needs the weights, which are asleep")
        new, take = old.like(placement), host_storage(self._ops)
        assert take is not None, "experts are spread on the CPU alone"
        group, layers = self._place.group, moe.layers
        self._sets.change(lambda sets: rearrange(group, sets, layers, old, new, take))
        self._placement = new

    def relink(self, communicator: Communicator[Any]) -> None:
        """Reach the other ranks by another communicator: some of them have been replaced."""
        self._place.relink(communicator, self._ops)

    def commit(self) -> None:
        """Make the staged set the live one, from the next step on."""
        self._sets.commit()
        self._forget_dropped()

    def discard_staged(self) -> None:
        """See `HeldSets.discard_staged`."""
        self._sets.discard_staged()

    def pin(self, name: str) -> None:
        """See `HeldSets.pin`."""
        self._sets.pin(name)

    def drop(self, name: str) -> None:
        """See `HeldSets.drop`."""
        self._sets.drop(name)
        self._forget_dropped()

    def _forget_dropped(self) -> None:
        if self._gpu_steps is not None:
            self._gpu_steps.keep(self._sets.places)

    # -- memory --------------------------------------------------------------------------------------------------------
    def sleep(self, tags: Collection[str], level: int, spill_dir: str | None = None) -> None:
        """Free the memory of "weights" (all sets) and "kv_cache". Level 1 writes the sets to a file in `spill_dir`, or
        copies those of a GPU to the host's memory.

        Raises ValueError where that cannot be done; nothing is freed then.
        """
        if "weights" in tags:
            self._sets.put_away(self._spill(spill_dir) if level == 1 else None)
        if "kv_cache" in tags:
            self._pool = None
        release_spare_weights(self._ops)
        if self._gpu_steps is None:
            forget_step(self._ops)
        else:
            self._gpu_steps.forget()

    def wake_up(self, tags: Collection[str]) -> None:
        """Bring back what `sleep` has put away: the sets of level 1, and an empty KV pool."""
        if "weights" in tags and self._sets.are_asleep:
            take: Any = host_storage(self._ops) if self._gpu_steps is None else self._gpu_steps.put
            assert take is not None, "spilled without a way back"
            self._sets.bring_back(take)
        if "kv_cache" in tags and self._pool is None:
            self._pool = self._make_pool()

    def close(self) -> None:
        """Wait for steps that were begun, and free the device's memory; nothing is to be run afterwards."""
        self._sets.clear()
        self._pool = None
        if self._gpu_steps is not None:
            release_spare_weights(self._ops)
            self._gpu_steps.forget()

    def _spill(self, spill_dir: str | None) -> Callable[[Mapping[str, WeightSet]], SpilledSets | HostedSets]:
        if self._gpu_steps is not None:
            return partial(HostedSets, get=self._gpu_steps.get, resident=self._rope)
        if host_storage(self._ops) is None:
            raise ValueError(f"level must be 2 on device {self._device!r}, got 1")
        return partial(SpilledSets, folder=spill_dir, resident=self._rope)
