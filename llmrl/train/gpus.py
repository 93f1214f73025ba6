"""GPUs by name, for plans: what their makers say that they can do. Sources are beside each; docs/scale.md has them with addresses."""

from __future__ import annotations

from dataclasses import dataclass

from llmrl.errors import ConfigError


@dataclass(frozen=True)
class Gpu:
    """flops: dense bf16 with float32 sums, FLOP/s. memory: bytes that a process sees. bandwidth: of that memory, bytes/s.

    link: bytes/s one way to the GPUs of the same machine (half of what is advertised, which adds both ways). network: bytes/s one
    way between machines, this GPU's share. node: GPUs of a machine.
    """

    flops: float
    memory: int
    bandwidth: float
    link: float
    network: float
    source: str
    node: int = 8


_GIB = 2**30
GPUS = {
    "a100-40g": Gpu(
        312e12, int(39.4 * _GIB), 1.555e12, 300e9, 25e9, "A100 datasheet; DGX A100: 8 x 200 Gb/s, NVLink 600 GB/s"
    ),
    "a100-80g": Gpu(
        312e12, int(79.1 * _GIB), 2.039e12, 300e9, 25e9, "A100 datasheet; DGX A100: 8 x 200 Gb/s, NVLink 600 GB/s"
    ),
    "h100-80g": Gpu(
        989.4e12, int(79.1 * _GIB), 3.35e12, 450e9, 50e9, "H100 SXM5 datasheet; DGX H100: 8 x 400 Gb/s, NVLink 900 GB/s"
    ),
    "h200-141g": Gpu(
        989.4e12, int(139.8 * _GIB), 4.8e12, 450e9, 50e9, "H200 SXM datasheet; DGX H200: 8 x 400 Gb/s, NVLink 900 GB/s"
    ),
    "b200-180g": Gpu(
        2250e12, int(178.3 * _GIB), 8e12, 900e9, 50e9, "DGX B200 datasheet: 8 x 400 Gb/s, NVLink 1.8 TB/s"
    ),
    "l40s-48g": Gpu(
        362e12, int(44.4 * _GIB), 0.864e12, 32e9, 1.6e9, "L40S datasheet; PCIe 4 x16; 100 Gb/s a machine is assumed"
    ),
    "rtx4090-24g": Gpu(
        165.2e12, int(23.5 * _GIB), 1.008e12, 32e9, 1.6e9, "Ada whitepaper; PCIe 4 x16; 100 Gb/s a machine is assumed"
    ),
}


def find_gpu(name: str) -> Gpu:
    """The GPU of a name in `GPUS`, whose size may be left out where it is the only one. Raises ConfigError."""
    found = [key for key in GPUS if key == name.lower() or key.partition("-")[0].removeprefix("rtx") == name.lower()]
    if len(found) != 1:
        raise ConfigError(f"--gpu {name}: {'several' if found else 'unknown'}; give one of {', '.join(GPUS)}")
    return GPUS[found[0]]
