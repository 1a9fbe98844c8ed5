"""What a GPU is to ggml: its kind and its memory. Pure."""

from dataclasses import dataclass

INTEGRATED, DISCRETE, REMOTE = "integrated", "discrete", "remote"


@dataclass(frozen=True, slots=True)
class Device:
    """A GPU as ggml's device API tells of it; `address` is its PCI address where it has one."""

    name: str
    kind: str
    total_bytes: int
    free_bytes: int
    address: str | None


def used(devices: list[Device]) -> list[Device]:
    """Returns the GPUs that llama.cpp takes: an integrated one only where there is no other."""
    return [device for device in devices if device.kind != INTEGRATED] or devices
