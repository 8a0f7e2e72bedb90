"""`Plan`: what loading a model would put on each device, and what would fit where it does not."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from nblens.text import aligned, byte_size, plain, short_number

__all__ = ["DevicePlan", "Plan", "Proposal"]


@dataclass(frozen=True)
class DevicePlan:
    """What one device would hold; sizes in bytes.

    >>> (device,) = nblens.plan(None, devices={"cuda:0": "8GiB"}, context=64).devices
    >>> device.left_bytes == device.limit_bytes - device.needed_bytes
    True
    """

    device: str
    """such as "cuda:0"; "disk"; "no room" for what fits nowhere"""
    parts: str
    """every part in order, such as "embedding, blocks 0-11, norm, lm_head" """
    weight_bytes: int
    expert_bytes: int
    """how much of the weights belongs to experts of which a token uses a few"""
    cache_bytes: int
    """keys and values of `context` tokens in each row, and states of linear attention"""
    readout_bytes: int
    """what the lens needs: captured activations that wait for the lm_head, and tiles of logits"""
    working_bytes: int
    """activations of a step, offloaded weights on their way through, and what the device's own software takes"""
    limit_bytes: int | None
    """memory that may be used; None where nothing says"""

    @property
    def needed_bytes(self) -> int:
        """All of it."""
        return self.weight_bytes + self.cache_bytes + self.readout_bytes + self.working_bytes

    @property
    def left_bytes(self) -> int | None:
        """What would be left; negative: what is lacking."""
        return None if self.limit_bytes is None else self.limit_bytes - self.needed_bytes


@dataclass(frozen=True)
class Proposal:
    """A setting that would fit, computed like the plan itself.

    >>> plan = nblens.plan(None, devices={"cuda:0": "1MiB"}, context=64)
    >>> all(proposal.plan.fits for proposal in plan.proposals)
    True
    """

    change: str
    """the change in words"""
    options: str
    """the same as options of `%load_sharded`; empty where the machine has to change"""
    plan: Plan


@dataclass(frozen=True)
class Plan:
    """Where a model would go, before any weight is read.

    >>> plan = nblens.plan(None, devices={"cuda:0": "8GiB"}, context=64)
    >>> plan.fits, plan.devices[0].parts, plan.nearest
    (True, 'embedding, blocks 0-11, norm, lm_head', None)
    """

    model: str
    n_parameters: int
    n_blocks: int
    dtype: str
    quantization: str | None
    tp: int
    pp: int
    context: int
    """tokens in each row that there is room for"""
    batch: int
    """rows"""
    chunk: int
    """tokens of all rows in a step while a prompt is read"""
    devices: tuple[DevicePlan, ...]
    device_map: Mapping[str, str] | None
    """module → device, as accelerate takes it; None where ranks load their own shards"""
    kept_modules: tuple[str, ...]
    """what quantization leaves as it is"""
    proposals: tuple[Proposal, ...] = ()
    """settings that would fit, the nearest first; empty where this one does"""

    @property
    def fits(self) -> bool | None:
        """Whether it does; None where a device does not say how much memory it has."""
        if any(device.device == "no room" for device in self.devices):
            return False
        left = [device.left_bytes for device in self.devices if device.device != "disk"]
        if any(value is not None and value < 0 for value in left):
            return False
        return None if None in left else True

    @property
    def nearest(self) -> Proposal | None:
        """The setting that would fit and changes least; None where this one fits, or nothing helps."""
        return self.proposals[0] if self.proposals else None

    @property
    def title(self) -> str:
        """What is planned, in a line."""
        kind = f"{self.dtype}, {self.quantization}" if self.quantization else self.dtype
        split = [f"{name}={n}" for name, n in (("tp", self.tp), ("pp", self.pp)) if n > 1]
        rows = f"{self.batch} rows of " if self.batch > 1 else ""
        parts = [f"{short_number(self.n_parameters)} parameters, {self.n_blocks} blocks", kind, *split]
        return f"{plain(self.model)}: {', '.join(parts)}, room for {rows}{self.context} tokens"

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of the table's columns; > for those that are set flush right."""
        return ("device", "holds", ">weights", ">KV cache", ">lens", ">working", ">left")

    @property
    def rows(self) -> list[tuple[str, ...]]:
        """A row of the table for each device."""
        return [
            (
                device.device,
                device.parts,
                *(
                    byte_size(size) if size else ""
                    for size in (device.weight_bytes, device.cache_bytes, device.readout_bytes, device.working_bytes)
                ),
                _left(device),
            )
            for device in self.devices
        ]

    @property
    def verdict(self) -> str:
        """Whether it fits, and what would where it does not."""
        if self.fits is None:
            return "whether it fits is not known: a device does not say how much memory it has"
        if self.fits:
            return "it fits"
        if not self.proposals:
            return "it does not fit, and no smaller setting was found that does"
        ways = "; ".join(_way(proposal) for proposal in self.proposals)
        return f"it does not fit; what would: {ways}"

    def __repr__(self) -> str:
        return "\n".join([self.title, *aligned(self.columns, self.rows), self.verdict])


def _left(device: DevicePlan) -> str:
    left, limit = device.left_bytes, device.limit_bytes
    return "" if left is None or limit is None else f"{byte_size(left)} of {byte_size(limit)}"


def _way(proposal: Proposal) -> str:
    return f"{proposal.change} ({proposal.options})" if proposal.options else proposal.change
