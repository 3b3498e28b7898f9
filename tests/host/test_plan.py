"""make_plan: every kernel can be reached, every refusal has a reason that says what, got, limit."""

from __future__ import annotations

import itertools
from types import ModuleType
from typing import Any

import pytest
from plan_problems import ALL, BUILT, DEVICES, REPRESENTATIVES, SIZES, problem, reasons

ROW_FAMILIES = ("combine", "bwd_preprocess", "rotary", "append_kv")
COMPANIONS = ("norm_fwd", "norm_bwd", "cross_entropy_fwd", "cross_entropy_bwd")
ATTENTION = ("fwd", "bwd")
SM90_BWD = BUILT


def test_named_devices(introspect: ModuleType) -> None:
    devices = introspect.devices()
    for name, (major, minor, num_sms, smem) in DEVICES.items():
        facts = devices[name]
        assert (facts["sm_major"], facts["sm_minor"], facts["num_sms"]) == (major, minor, num_sms)
        assert facts["max_smem_bytes"] == smem * 1024
    for arch, name in REPRESENTATIVES.items():
        assert devices[arch] == devices[name]
    assert set(devices) == {*DEVICES, *REPRESENTATIVES}


def test_every_instance_can_be_reached(introspect: ModuleType) -> None:
    reached = set()
    for device, family, dtype in itertools.product(
        introspect.devices(), introspect.families(), introspect.dtypes()
    ):
        for head_dim in BUILT:
            sizes = {"head_dim": head_dim, "head_dim_v": head_dim}
            for built in (ALL, ["sm80"]):
                plan = introspect.make_plan(problem(family, dtype=dtype, **sizes), device, built)
                if plan["ok"]:
                    reached.add(plan["kernel"])
    names = [row["name"] for row in introspect.kernels()]
    assert reached == set(names)
    assert len(names) == len(set(names))
    assert [row["id"] for row in introspect.kernels()] == list(range(len(names)))


def test_instances_of_this_version(introspect: ModuleType) -> None:
    rows = introspect.kernels()
    row_types = ("fp16", "bf16", "fp32")
    expected = {
        *itertools.product(("sm80", "sm90"), (*ROW_FAMILIES, *COMPANIONS), row_types, (0,)),
        *itertools.product(("sm80", "sm90"), ("decode",), ("fp16", "bf16"), BUILT),
        *itertools.product(("sm80",), ATTENTION, ("fp16", "bf16"), BUILT),
        *itertools.product(("sm90",), ("fwd",), ("fp16", "bf16"), BUILT),
        *itertools.product(("sm90",), ("bwd",), ("fp16", "bf16"), SM90_BWD),
    }
    found = {(row["arch"], row["family"], row["dtype"], row["head_dim"]) for row in rows}
    assert found == expected


@pytest.mark.parametrize("family", [*ROW_FAMILIES, *COMPANIONS])
@pytest.mark.parametrize("device", [*DEVICES])
def test_library_of_each_device(introspect: ModuleType, device: str, family: str) -> None:
    plan = introspect.make_plan(problem(family), device, ALL)
    own = "sm90" if DEVICES[device][0] == 9 else "sm80"
    assert plan["ok"]
    assert (plan["arch"], plan["library"]) == (own, f"_{own}")
    assert plan["kernel"] == f"{own}_{family}_bf16"
    assert plan["num_threads"] % 32 == 0
    assert plan["num_ctas"] > 0
    if family != "norm_bwd":
        assert plan["workspace_bytes"] == plan["smem_bytes"] == 0


def test_older_library_stands_in(introspect: ModuleType) -> None:
    plan = introspect.make_plan(problem("combine"), "h100", ["sm80"])
    assert plan["kernel"] == "sm80_combine_bf16"
    assert plan["reasons"] == ["sm90: its library is not present (present: sm80)"]


ROWS = "combine, bwd_preprocess, rotary, append_kv"


@pytest.mark.parametrize("family", ATTENTION)
@pytest.mark.parametrize("device", [*DEVICES])
def test_attention_on_each_device(introspect: ModuleType, device: str, family: str) -> None:
    """Kernels of SM80 run everywhere, with the tiles that fit the device's shared memory."""
    major, minor, _, smem_kb = DEVICES[device]
    for head_dim, dtype in itertools.product(BUILT, ("fp16", "bf16")):
        fields = problem(family, dtype=dtype, head_dim=head_dim, head_dim_v=head_dim)
        plan = introspect.make_plan(fields, device, ["sm80"])
        assert plan["kernel"] == f"sm80_{family}_hdim{head_dim}_{dtype}"
        tiles = "sm80" if smem_kb >= 163 else "sm89"
        if smem_kb >= 227 and (head_dim == 256 if family == "fwd" else head_dim <= 96):
            tiles = "sm90"  # some sizes have tiles for that much
        assert (plan["library"], plan["tiles"]) == ("_sm80", tiles)
        tile = getattr(introspect, f"sm80_{family}_tile_config")(tiles, head_dim)
        assert plan["tile"] == (tile["tile_m"], tile["tile_n"])
        assert plan["num_threads"] == tile["num_threads"]
        assert plan["smem_bytes"] == tile["smem_bytes"] <= smem_kb * 1024
        assert len(plan["reasons"]) == (major == 9 or (major, minor) == (8, 9))


SCORE_MODS = [
    {"softcap": True},
    {"alibi": True},
    {"dropout": True},
    {"positive_scale": False},
]


@pytest.mark.parametrize("head_dim", BUILT)
@pytest.mark.parametrize("device", ["h100", "h200"])
def test_sm90_fwd(introspect: ModuleType, device: str, head_dim: int) -> None:
    """One persistent CTA to an SM at most."""
    sizes = {"head_dim": head_dim - 24, "head_dim_v": head_dim, "seqlen_q": 1000}
    for batch_size, varlen, options in itertools.product(
        (1, 40), (False, True), ({}, {"window_right": 0}, {"window_left": 64}, *SCORE_MODS)
    ):
        fields = problem(
            "fwd", batch_size=batch_size, varlen=varlen, total_q=3000, **sizes, **options
        )
        plan = introspect.make_plan(fields, device, ALL)
        assert plan["kernel"] == f"sm90_fwd_hdim{head_dim}_bf16"
        assert (plan["library"], plan["tiles"], plan["reasons"]) == ("_sm90", "sm90", [])
        which = ["score_mod"] if options in SCORE_MODS else ["long", "fine"]
        tiles = [introspect.sm90_fwd_tile_config(head_dim, head_dim, w) for w in which]
        (tile,) = [t for t in tiles if plan["tile"] == (t["tile_m"], t["tile_n"])][:1]
        assert plan["num_threads"] == tile["num_threads"]
        assert plan["smem_bytes"] == tile["smem_bytes"]
        per_head = 3000 // tile["tile_m"] + batch_size + 1
        num_tiles = 4 * (per_head if varlen else batch_size * -(-1000 // tile["tile_m"]))
        assert plan["num_ctas"] == min(num_tiles, 132)
        assert plan["workspace_bytes"] == 0


@pytest.mark.parametrize(
    ("head_dim", "batch_size", "seqlen", "options", "expected"),
    [
        (64, 8, 2048, {}, "long"),
        (64, 32, 512, {}, "fine"),
        (64, 1, 16384, {"window_right": 0}, "long"),
        (64, 4, 4096, {"window_right": 0}, "fine"),
        (128, 8, 2048, {}, "long"),
        (128, 32, 512, {}, "fine"),  # 192 rows leave a quarter of a tile empty
        (128, 1, 8192, {"num_heads_q": 2}, "fine"),  # 86 long tiles for 132 SMs
        (128, 8, 2048, {"window_right": 0}, "fine"),
        (128, 4, 4096, {"window_right": 0}, "long"),
        (128, 8, 2048, {"window_left": 256}, "fine"),
        (96, 8, 2048, {"window_right": 0}, "long"),
        (96, 8, 2048, {"window_right": 0, "window_left": 256}, "fine"),
        (96, 32, 512, {"window_right": 0}, "fine"),
    ],
)
def test_sm90_fwd_tile(
    introspect: ModuleType,
    head_dim: int,
    batch_size: int,
    seqlen: int,
    options: dict[str, int],
    expected: str,
) -> None:
    """Long tiles are faster for many keys; fine ones on short borders and where few are left."""
    sizes = {"head_dim": head_dim, "head_dim_v": head_dim, "batch_size": batch_size}
    heads = {"num_heads_q": 16, "num_heads_kv": 1}
    lengths = {"seqlen_q": seqlen, "seqlen_k": seqlen}
    fields = problem("fwd", **{**sizes, **heads, **lengths, **options})
    tile = introspect.sm90_fwd_tile_config(head_dim, head_dim, expected)
    assert introspect.make_plan(fields, "h100", ALL)["tile"] == (tile["tile_m"], tile["tile_n"])


def test_what_sm90_fwd_leaves_to_sm80(introspect: ModuleType) -> None:
    plan = introspect.make_plan(problem("fwd", dmask=True), "h100", ALL)
    assert plan["kernel"] == "sm80_fwd_hdim128_bf16"
    assert plan["reasons"] == ["sm90: dmask: its fwd writes no dropout mask"]


@pytest.mark.parametrize("head_dim", SM90_BWD)
@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_sm90_bwd(introspect: ModuleType, dtype: str, head_dim: int) -> None:
    """All options; a CTA or a pair for each tile of keys; dQ of whole tiles of 64 rows."""
    tile = introspect.bwd_tile_config("sm90", head_dim)
    assert (tile["tile_m"], tile["tile_n"], tile["num_threads"]) == (64, 128, 512)
    padding = 2 * 256 * (-head_dim % 64) + 2 * tile["num_q_stages"] * 128 * (-head_dim % 64)
    sizes = {"dtype": dtype, "head_dim": head_dim - 8, "head_dim_v": head_dim, "seqlen_q": 1000}
    options = {"softcap": True, "alibi": True, "dropout": True, "positive_scale": False}
    for fields in ({}, {"window_right": 0}, {"window_left": 64}, {"deterministic": True}, options):
        plan = introspect.make_plan(problem("bwd", **sizes, **fields), "h100", ALL)
        assert plan["kernel"] == f"sm90_bwd_hdim{head_dim}_{dtype}"
        assert (plan["library"], plan["tiles"], plan["reasons"]) == ("_sm90", "sm90", [])
        assert plan["tile"] == (64, 128)
        statistics = 8 * 64 * tile["num_q_stages"]
        assert plan["smem_bytes"] == tile["smem_bytes"] + padding + statistics + 512 <= 227 * 1024
        assert (plan["num_ctas"], plan["head_splits"]) == (1 * 4 * 2 * tile["num_ctas"], 1)
        counters = (16 * 2 * 4 + 1) * 4 if fields.get("deterministic") else 0
        sums = 2 * 1024 * 4 * head_dim * 4
        completes = head_dim <= 128 and fields is not options
        assert plan["workspace_bytes"] == (0 if completes else sums + counters)


CAUSAL = {"window_right": 0}


@pytest.mark.parametrize(
    ("heads", "fields", "expected"),
    [
        ((32, 8), {}, 1),  # 1024 tiles of keys for 132 SMs
        ((32, 8), CAUSAL, 1),
        ((32, 8), {"seqlen_k": 1024}, 1),  # 128: nearly a whole wave
        ((32, 8), {"seqlen_k": 1024, **CAUSAL}, 4),  # the longest ones end when all others have
        ((64, 8), CAUSAL, 2),  # the query heads that run at a time are too many for L2
        ((64, 8), {**CAUSAL, "head_dim": 64, "head_dim_v": 64}, 1),
        ((16, 1), {"seqlen_k": 4096}, 2),  # 64
        ((16, 1), {"seqlen_k": 4096, **CAUSAL}, 8),
        ((16, 1), {"seqlen_k": 4096, "head_dim": 256, "head_dim_v": 256}, 1),  # a pair for each
        ((16, 1), {"seqlen_k": 4096, "seqlen_q": 60}, 1),  # too little to do
        ((8, 8), {"seqlen_k": 128}, 1),  # nothing to share
    ],
)
@pytest.mark.parametrize("deterministic", [False, True])
def test_sm90_bwd_head_splits(
    introspect: ModuleType,
    heads: tuple[int, int],
    fields: dict[str, Any],
    expected: int,
    deterministic: bool,
) -> None:
    """CTAs share the query heads of a KV head where its tiles of keys leave SMs idle."""
    sizes = {"batch_size": 2, "seqlen_q": 8192, "seqlen_k": 8192, "deterministic": deterministic}
    sizes |= {"num_heads_q": heads[0], "num_heads_kv": heads[1], **fields}
    plan = introspect.make_plan(problem("bwd", **sizes), "h100", ALL)
    pairs = 2 if sizes.get("head_dim") == 256 else 1
    tiles = 2 * sizes["seqlen_k"] // 128 * heads[1]
    assert plan["library"] == "_sm90"
    assert (plan["head_splits"], plan["num_ctas"]) == (expected, tiles * expected * pairs)
    if expected > 1:
        accum = 2 * sizes["seqlen_k"] * heads[1] * 2 * 128 * 4
        assert plan["workspace_bytes"] >= accum + 4 * tiles * deterministic


def test_dq_of_one_tile_of_keys_needs_no_workspace(introspect: ModuleType) -> None:
    """Plain SM80 kernels of head_dim 64 and 128, with the tiles of 163 KB and more."""
    sizes = {"num_heads_q": 4, "num_heads_kv": 4, "head_dim": 128, "head_dim_v": 128}
    packed = {"varlen": True, "total_q": 900, "total_k": 300}
    for fields in ({}, {"deterministic": True}, packed, {"head_dim": 64, "head_dim_v": 40}):
        for seqlen_k in (1, 128, 129):
            keys = {**sizes, "seqlen_k": seqlen_k, **fields}
            plan = introspect.make_plan(problem("bwd", **keys), "a100", ALL)
            assert (plan["workspace_bytes"] == 0) == (seqlen_k <= 128 == plan["tile"][1])
    for fields in ({"softcap": True}, {"dropout": True}, {"head_dim": 192}, {"head_dim": 96}):
        keys = {**sizes, "seqlen_k": 128, "head_dim_v": 64, **fields}
        assert introspect.make_plan(problem("bwd", **keys), "a100", ALL)["workspace_bytes"] > 0
    keys = {**sizes, "seqlen_k": 128}
    assert introspect.make_plan(problem("bwd", **keys), "rtx4090", ALL)["workspace_bytes"] > 0


def test_where_sm90_completes_dq(introspect: ModuleType) -> None:
    """It has counters where there are few keys, not fewer queries, and enough tiles if masked."""
    heads = {"num_heads_q": 16, "num_heads_kv": 16, "head_dim": 128, "head_dim_v": 128}

    def has_counters(seqlen: int, **fields: Any) -> bool:
        sizes = {"batch_size": 16384 // seqlen, "seqlen_q": seqlen, "seqlen_k": seqlen}
        keys = {**heads, **sizes, **fields}
        plan = introspect.make_plan(problem("bwd", **keys), "h100", ALL)
        built = min(size for size in BUILT if size >= keys["head_dim"])
        tiles = keys["batch_size"] * -(-keys["seqlen_q"] // 64) * keys["num_heads_q"]
        if keys.get("varlen"):
            tiles = (keys["total_q"] // 64 + keys["batch_size"]) * keys["num_heads_q"]
        counters = plan["workspace_bytes"] - tiles * 64 * built * 4
        assert counters in (0, (tiles + 1) * 4)
        return counters > 0

    causal = {"window_right": 0}
    small = {"head_dim": 64, "head_dim_v": 64}
    packed = {"varlen": True, "total_q": 40000, "total_k": 40000, "batch_size": 16}
    for seqlen, fields in (
        *((512, {}), (2048, {}), (2048, causal), (1024, small), (1536, {**small, **causal})),
        *((512, {"seqlen_q": 2048}), (4096, {**packed, **causal})),
        (1024, {"batch_size": 4}),  # few tiles, equally long
    ):
        assert has_counters(seqlen, **fields), (seqlen, fields)
    for seqlen, fields in (
        *((2304, {}), (2304, causal), (1152, small), (2048, {**small, **causal})),
        *((1024, {"seqlen_q": 512}), (4096, packed), (1024, {"batch_size": 4, **causal})),
        *((512, {"softcap": True}), (512, {"dropout": True}), (512, {"head_dim": 192})),
    ):
        assert not has_counters(seqlen, **fields), (seqlen, fields)


@pytest.mark.parametrize("family", ATTENTION)
def test_head_dims_run_in_the_next_built_size(introspect: ModuleType, family: str) -> None:
    for head_dim, head_dim_v in [(1, 1), (8, 64), (64, 65), (192, 128), (64, 128), (129, 8)]:
        fields = problem(family, head_dim=head_dim, head_dim_v=head_dim_v)
        plan = introspect.make_plan(fields, "a100", ALL)
        built = min(size for size in BUILT if size >= max(head_dim, head_dim_v))
        assert plan["kernel"] == f"sm80_{family}_hdim{built}_bf16"
        assert plan["vectorized"] is (head_dim % 8 == 0 and head_dim_v % 8 == 0)
        unaligned = introspect.make_plan({**fields, "alignment_bytes": 8}, "a100", ALL)
        assert unaligned["ok"]
        assert not unaligned["vectorized"]


@pytest.mark.parametrize("device", ["a100", "rtx4090"])
def test_attention_grid(introspect: ModuleType, device: str) -> None:
    """A CTA for each tile; varlen one slot more for each sequence, and for the rows behind."""
    for seqlen, batch_size in itertools.product((0, 1, 128, 129, 1000), (0, 1, 3)):
        sizes = {"batch_size": batch_size, "num_heads_q": 6, "num_heads_kv": 2}
        lengths = {"seqlen_q": seqlen, "seqlen_k": seqlen + 7}
        fixed = {**sizes, **lengths}
        totals = {"total_q": 3 * seqlen + 5, "total_k": 2 * seqlen}
        varlen = {**fixed, **totals, "varlen": True}
        for family, rows, total, heads in (
            ("fwd", "seqlen_q", "total_q", 6),
            ("bwd", "seqlen_k", "total_k", 2),
        ):
            plan = introspect.make_plan(problem(family, **fixed), device, ALL)
            tile = plan["tile"][family == "bwd"]
            shares = 3 if family == "bwd" else 1  # so few tiles of keys: a CTA for each query head
            assert plan["head_splits"] == shares
            assert plan["num_ctas"] == -(-fixed[rows] // tile) * heads * shares * batch_size
            plan = introspect.make_plan(problem(family, **varlen), device, ALL)
            assert plan["num_ctas"] == (totals[total] // tile + batch_size + 1) * heads * shares


@pytest.mark.parametrize(
    ("num_heads_q", "num_heads_kv", "batch_size", "seqlen_k", "expected"),
    [
        (32, 8, 2, 8192, 1),  # 1024 tiles of keys for 132 SMs
        (32, 8, 2, 2048, 4),  # 256: four CTAs share them, one for each query head
        (16, 1, 2, 4096, 16),
        (12, 2, 2, 16384, 2),  # 512: two are enough
        (16, 16, 1, 128, 1),  # nothing to share
    ],
)
def test_bwd_head_splits(
    introspect: ModuleType,
    num_heads_q: int,
    num_heads_kv: int,
    batch_size: int,
    seqlen_k: int,
    expected: int,
) -> None:
    """dK and dV are added up in fp32, as large as K and V, where CTAs share query heads."""
    sizes = {"batch_size": batch_size, "seqlen_q": 200, "seqlen_k": seqlen_k}
    heads = {"num_heads_q": num_heads_q, "num_heads_kv": num_heads_kv}
    plan = introspect.make_plan(problem("bwd", **sizes, **heads), "h100", ["sm80"])
    tile_m, tile_n = plan["tile"]
    tiles = batch_size * -(-seqlen_k // tile_n) * num_heads_kv
    assert (plan["head_splits"], plan["num_ctas"]) == (expected, tiles * expected)
    dq_accum = batch_size * -(-200 // tile_m) * tile_m * num_heads_q * 128 * 4
    if seqlen_k <= tile_n:  # see test_dq_of_one_tile_of_keys_needs_no_workspace
        dq_accum = 0
    dkv_accum = 2 * batch_size * seqlen_k * num_heads_kv * 128 * 4
    assert plan["workspace_bytes"] == dq_accum + (dkv_accum if expected > 1 else 0)


@pytest.mark.parametrize("head_dim", BUILT)
@pytest.mark.parametrize("varlen", [False, True])
def test_bwd_workspace(introspect: ModuleType, varlen: bool, head_dim: int) -> None:
    """dQ in fp32, whole tiles; a deterministic one has a counter for each tile and head,
    and one that deals out tiles of keys.
    """
    fields = problem(
        "bwd",
        head_dim=head_dim - 8,
        head_dim_v=head_dim,
        seqlen_q=1000,
        seqlen_k=1000,
        total_q=1900,
        varlen=varlen,
    )
    plan = introspect.make_plan(fields, "a100", ALL)
    tile_m = plan["tile"][0]
    tiles = 1900 // tile_m + 2 if varlen else 2 * -(-1000 // tile_m)
    assert plan["workspace_bytes"] == tiles * tile_m * SIZES["num_heads_q"] * head_dim * 4
    deterministic = introspect.make_plan({**fields, "deterministic": True}, "a100", ALL)
    counters = (tiles * SIZES["num_heads_q"] + 1) * 4
    assert deterministic["workspace_bytes"] == plan["workspace_bytes"] + counters
    assert deterministic["workspace_bytes"] <= 1.1 * plan["workspace_bytes"]
    fields["family"] = "fwd"
    assert introspect.make_plan(fields, "a100", ALL)["workspace_bytes"] == 0


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        (
            problem("combine", dtype="fp64"),
            "sm80: dtype=fp64: combine is built for fp16, bf16, fp32",
        ),
        (problem("combine", head_dim_v=264), "sm80: head_dim_v=264: combine takes at most 256"),
        (problem("combine", num_splits=1025), "sm80: num_splits=1025: combine takes at most 1024"),
        (
            problem("combine", batch_size=2**16, seqlen_q=2**13),
            "sm80: rows=2147483648: combine takes at most 2147483647",
        ),
        (
            problem("bwd_preprocess", head_dim_v=257),
            "sm80: head_dim_v=257: bwd_preprocess takes at most 256",
        ),
        (problem("rotary", head_dim=512), "sm80: head_dim=512: rotary takes at most 256"),
        (problem("rotary", rotary_dim=7), "sm80: rotary_dim=7: rotary needs an even number"),
        (
            problem("rotary", head_dim=64, rotary_dim=66),
            "sm80: rotary_dim=66: rotary takes at most head_dim=64",
        ),
        (
            problem("append_kv", head_dim_v=300),
            "sm80: head_dim_v=300: append_kv takes at most 256",
        ),
        (problem("append_kv", rotary_dim=5), "sm80: rotary_dim=5: append_kv needs an even number"),
        (problem("norm_fwd", head_dim=16392), "sm80: head_dim=16392: norm_fwd takes at most 16384"),
        (problem("norm_bwd", head_dim=16392), "sm80: head_dim=16392: norm_bwd takes at most 16384"),
        (
            problem("norm_bwd", head_dim=8200, alignment_bytes=8),
            "sm80: head_dim=8200: norm_bwd takes more than 8192 only as a multiple of 8 in rows "
            "that begin at multiples of 16 bytes",
        ),
        (
            problem("cross_entropy_fwd", dtype="fp64"),
            "sm80: dtype=fp64: cross_entropy_fwd is built for fp16, bf16, fp32",
        ),
        (problem("fwd", dtype="fp32"), "sm80: dtype=fp32: fwd is built for fp16, bf16"),
        (problem("bwd", dtype="fp64"), "sm80: dtype=fp64: bwd is built for fp16, bf16"),
        (
            problem("fwd", head_dim=257),
            "sm80: head_dim=257: fwd is built for 64, 96, 128, 192, 256",
        ),
        (
            problem("bwd", head_dim_v=264),
            "sm80: head_dim_v=264: bwd is built for 64, 96, 128, 192, 256",
        ),
        (problem("fwd", page_size=16), "sm80: page_size=16: fwd takes keys without pages"),
        (problem("fwd", num_splits=2), "sm80: num_splits=2: fwd does not split the keys"),
        (
            problem("fwd", batch_size=2**20, seqlen_q=2**12),
            "sm80: total_q=4294967296: fwd takes at most 2147483647",
        ),
        (
            problem("bwd", num_heads_q=2**20, num_heads_kv=1, seqlen_q=2**20),
            "sm80: tiles_q=34359738368: bwd takes at most 2147483647",
        ),
        (problem("fwd", head_dim=0), "head_dim=0: expected 1 to 1073741824"),
        (problem("fwd", batch_size=-1), "batch_size=-1: expected 0 to 1073741824"),
        (problem("fwd", page_size=-1), "page_size=-1: expected 0 to 1073741824"),
        (
            problem("fwd", num_heads_q=6),
            "num_heads_q=6: expected a multiple of num_heads_kv=4",
        ),
    ],
)
def test_reasons(introspect: ModuleType, fields: dict[str, Any], expected: str) -> None:
    assert reasons(introspect, fields) == [expected]


def test_launch_limit(introspect: ModuleType) -> None:
    huge = problem("bwd_preprocess", seqlen_q=2**30, batch_size=2**10, num_heads_q=2**8)
    (reason,) = reasons(introspect, {**huge, "num_heads_kv": 2**8})
    assert reason.startswith("sm80: num_ctas=")
    assert reason.endswith("a launch has at most 2147483647")


def test_little_shared_memory(introspect: ModuleType) -> None:
    facts = {**introspect.devices()["a100"], "max_smem_bytes": 48 * 1024}
    assert introspect.make_plan(problem("fwd", head_dim=64, head_dim_v=64), facts, ALL)["ok"]
    assert reasons(introspect, problem("fwd"), facts) == [
        "sm80: smem_bytes=65536: a CTA of the device has at most 49152"
    ]


def test_old_gpu(introspect: ModuleType) -> None:
    turing = {"sm_major": 7, "sm_minor": 5, "num_sms": 68, "max_smem_bytes": 65536}
    assert reasons(introspect, problem("combine"), {**turing, "l2_bytes": 4 << 20}) == [
        "sm90: its code runs on compute capability 9.x only, got 7.5",
        "sm89: its code runs on compute capability 8.9 only, got 7.5",
        "sm80: its code needs compute capability 8.0 or newer, got 7.5",
    ]


def test_no_library(introspect: ModuleType) -> None:
    plan = introspect.make_plan(problem("rotary"), "a100", [])
    assert plan["reasons"] == ["sm80: its library is not present (present: none)"]


@pytest.mark.parametrize(
    ("fields", "vectorized"),
    [
        (problem("combine", head_dim_v=64), True),
        (problem("combine", head_dim_v=66), False),
        (problem("combine", head_dim_v=64, alignment_bytes=8), False),
        (problem("bwd_preprocess", head_dim_v=72), True),
        (problem("bwd_preprocess", head_dim_v=68), False),
        (problem("bwd_preprocess", head_dim_v=68, dtype="fp32"), True),
        (problem("rotary", head_dim=64, rotary_dim=32), True),
        (problem("rotary", head_dim=64, rotary_dim=24), False),
        (problem("rotary", head_dim=64, rotary_dim=24, dtype="fp32"), True),
        (problem("append_kv", head_dim=64, head_dim_v=32), True),
        (problem("append_kv", head_dim=64, head_dim_v=36), False),
        (problem("append_kv", alignment_bytes=4), False),
    ],
)
def test_vectors(introspect: ModuleType, fields: dict[str, Any], vectorized: bool) -> None:
    plan = introspect.make_plan(fields, "h100", ALL)
    assert plan["ok"]
    assert plan["vectorized"] is vectorized


def test_combine_grid_covers_all_rows(introspect: ModuleType) -> None:
    for head_dim_v, alignment, batch, seqlen in itertools.product(
        (1, 8, 64, 100, 256), (4, 16), (0, 1, 3), (0, 1, 65)
    ):
        fields = problem("combine", head_dim_v=head_dim_v, alignment_bytes=alignment)
        plan = introspect.make_plan(
            {**fields, "batch_size": batch, "seqlen_q": seqlen}, "h100", ALL
        )
        rows = batch * seqlen * SIZES["num_heads_q"]
        assert plan["num_ctas"] == -(-rows // plan["tile"][0])
        assert plan["tile"][1] == head_dim_v
        assert plan["num_splits"] == 4


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("hidden_size", [1, 64, 100, 1536, 4096, 8192, 12288, 16384])
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_norms(introspect: ModuleType, dtype: str, hidden_size: int, bias: bool) -> None:
    """Rows of 16 bits come through a ring, in as many CTAs as there are at once."""
    for rows, alignment in itertools.product((0, 1, 1000, 1 << 20), (2, 16)):
        if hidden_size > 8192 and alignment < 16:
            continue
        sizes = {"head_dim": hidden_size, "seqlen_q": rows, "alignment_bytes": alignment}
        forward, backward = (
            introspect.make_plan(
                {"family": family, "dtype": dtype, "bias": bias, **sizes}, "h100", ALL
            )
            for family in ("norm_fwd", "norm_bwd")
        )
        assert forward["vectorized"] is backward["vectorized"]
        assert forward["vectorized"] is (alignment == 16 and hidden_size % 8 == 0)
        ring = forward["vectorized"] and dtype == "bf16"
        at_once, size = forward["tile"]
        assert size == hidden_size
        assert at_once * hidden_size <= (32 if ring else 16) * forward["num_threads"]
        ctas = -(-rows // at_once)
        if ring:
            ctas = max(1, min(ctas, 132 * max(1, 512 // forward["num_threads"])))
        assert forward["num_ctas"] == ctas
        ring = ring and hidden_size <= 8192
        at_once = backward["tile"][0]
        vectors = -(-hidden_size // 8192)
        columns = 16 if ring else 8 * vectors
        assert at_once * hidden_size <= columns * backward["num_threads"]
        assert 1 <= backward["num_ctas"] <= max(1, rows)
        assert backward["num_ctas"] * backward["num_threads"] <= max(1024, 132 * 1024)
        padded = -(-hidden_size // 8) * 8
        gradients = 2 if bias else 1
        assert backward["workspace_bytes"] == 4 * gradients * backward["num_ctas"] * padded
        if not ring:
            assert backward["num_ctas"] <= max(1, -(-rows // at_once))
            smem_bytes = 4 * gradients * 8 * vectors * backward["num_threads"]
            assert backward["smem_bytes"] == smem_bytes


def test_cross_entropy_takes_any_vocabulary(introspect: ModuleType) -> None:
    for family, vocabulary in itertools.product(COMPANIONS[2:], (1, 50257, 1 << 20)):
        sizes = {"head_dim": vocabulary, "seqlen_q": 77, "alignment_bytes": 1}
        plan = introspect.make_plan({"family": family, "dtype": "fp16", **sizes}, "sm86", ALL)
        assert plan["num_ctas"] == 77
        assert plan["tile"] == (1, vocabulary)
        assert plan["vectorized"]


def test_plans_ignore_flags_that_a_family_has_no_use_for(introspect: ModuleType) -> None:
    flags = ("softcap", "alibi", "dropout", "deterministic")
    plain = introspect.make_plan(problem("combine"), "h100", ALL)
    flagged = problem("combine", **dict.fromkeys(flags, True), window_left=3, page_size=5)
    assert introspect.make_plan(flagged, "h100", ALL) == plain


@pytest.mark.parametrize(
    ("fields", "device", "built", "message"),
    [
        ({"head_dims": 64}, "sm80", ALL, "unknown field 'head_dims'"),
        ({"head_dim": 2**40}, "sm80", ALL, "expected an integer of 32 bits"),
        ({"head_dim": "64"}, "sm80", ALL, "head_dim='64': expected an integer"),
        ({"family": "forward"}, "sm80", ALL, "family='forward': expected one of fwd, bwd, decode"),
        ({"dtype": "half"}, "sm80", ALL, "dtype='half': expected one of fp16, bf16, fp32, fp64"),
        ({}, "voodoo2", ALL, "device='voodoo2': expected one of a100"),
        ({}, {"sm_major": 8}, ALL, "field 'sm_minor' is missing"),
        ({}, "sm80", ["sm70"], "arch='sm70': expected one of sm80, sm89, sm90"),
    ],
)
def test_bad_questions(
    introspect: ModuleType, fields: dict[str, Any], device: Any, built: list[str], message: str
) -> None:
    with pytest.raises(ValueError, match=message.replace("'", ".")):
        introspect.make_plan(fields, device, built)
