"""The plan of a conversion: sizes and types of the real model, and what a user's options do to them."""

import math
import time
from pathlib import Path
from typing import Any

import pytest
from gguf import GGMLQuantizationType as T

from checkpoints import REAL, write_checkpoint
from convert_step35.cli.workspace import Workspace, open_workspace
from convert_step35.errors import PlanError
from convert_step35.models import load_models
from convert_step35.planning.plan import ConversionOptions, MtpMode, Plan, TargetSize
from convert_step35.planning.recipes import parse_override

MODELS = load_models()


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """A sparse checkpoint of the real shapes: 399 GB of holes."""
    folder = write_checkpoint(tmp_path_factory.mktemp("real") / "Step-3.5-Flash", REAL, sparse=True, n_shards=44)
    return open_workspace(folder, MODELS, mtp=MtpMode.KEEP)


def plan(workspace: Workspace, types: str | TargetSize, **options: Any) -> Plan:
    return workspace.plan(ConversionOptions(Path("out.gguf"), types, **options), MODELS)


def test_the_real_checkpoint_is_recognised_by_its_shape(real: Workspace) -> None:
    known = MODELS.checkpoints["step-3.5-flash"]
    assert real.known == known
    assert (real.checkpoint.n_text_tensors, real.checkpoint.n_text_bytes) == (known.n_tensors, known.n_bytes)


def test_planning_the_real_checkpoint_takes_a_moment(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "c", REAL, sparse=True, n_shards=44)
    start = time.process_time()
    plan(open_workspace(folder, MODELS, mtp=MtpMode.KEEP), types="Q4_K_M")
    assert time.process_time() - start < 5


# GiB of the tensor data: AesSedai's published files of these mixes, and the sizes of converter arithmetic.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("recipe", "gib"),
    [
        ("MOE_Q8_0", 197.43),
        ("MOE_Q5_K_Q6_K", 138.83),
        ("MOE_Q4_K_Q5_K", 116.22),
        ("MOE_Q4_K", 108.84),
        ("MOE_IQ4_XS_Q4_K", 105.15),
        ("MOE_IQ4_XS", 103.30),
        ("MOE_IQ4_XS_REST_Q6_K", 101.25),
        ("MOE_IQ4_XS_REST_Q5_K", 100.13),
        ("MOE_IQ3_S_Q4_K", 93.15),
        ("MOE_IQ3_S_IQ4_XS", 91.31),
    ],
)
def test_recipes_have_the_published_sizes(real: Workspace, recipe: str, gib: float) -> None:
    made = plan(real, types=recipe)
    data = sum(tensor.n_bytes for tensor in made.tensors)
    assert data / 2**30 == pytest.approx(gib, abs=0.006)
    assert len(made.tensors) == 805


@pytest.mark.slow
def test_recipes_are_listed_from_large_to_small(real: Workspace) -> None:
    """--target-size takes the first that fits, so a smaller one must never hide a larger."""
    sizes = [sum(t.n_bytes for t in plan(real, types=name).tensors) for name in list(MODELS.recipes)[:11]]
    assert sizes == sorted(sizes, reverse=True)


@pytest.mark.slow
def test_target_size_counts_the_whole_file(real: Workspace) -> None:
    made = plan(real, types=TargetSize(103 * 2**30))
    assert made.recipe == "MOE_IQ4_XS_MTP_Q6_K" and made.n_bytes <= 103 * 2**30
    assert plan(real, types=TargetSize(int(103.5 * 2**30))).recipe == "MOE_IQ4_XS"
    assert plan(real, types=TargetSize(103 * 2**30), mtp=MtpMode.DROP).recipe == "MOE_IQ4_XS_Q4_K"


@pytest.mark.slow
def test_a_target_that_nothing_fits_names_the_smallest_recipe(real: Workspace) -> None:
    with pytest.raises(PlanError, match=r"MOE_IQ3_S_IQ4_XS, needs 91\.\d+ GiB, got 50\.00 GiB"):
        plan(real, types=TargetSize(50 * 2**30))


def test_every_byte_has_one_place(real: Workspace) -> None:
    """Tensors follow the header without overlap, aligned to 32 bytes, up to the file's end."""
    made = plan(real, types="IQ4_XS", split_max_bytes=20 * 10**9)
    assert len(made.files) > 5
    for file in made.files:
        end = len(file.header)
        for tensor in file.tensors:
            assert tensor.offset == math.ceil(end / 32) * 32
            end = tensor.offset + tensor.n_bytes
        assert file.n_bytes == math.ceil(end / 32) * 32
        assert file.n_bytes - len(file.header) <= 20 * 10**9


def test_split_keeps_all_tensors_and_numbers_the_shards(real: Workspace) -> None:
    whole, split = plan(real, types="Q8_0"), plan(real, types="Q8_0", split_max_bytes=50 * 10**9)
    assert [t.mapped for t in split.tensors] == [t.mapped for t in whole.tensors]
    n = len(split.files)
    assert [f.path.name for f in split.files] == [f"out-{i + 1:05d}-of-{n:05d}.gguf" for i in range(n)]


def test_a_shard_too_small_for_one_tensor_is_refused(real: Workspace) -> None:
    with pytest.raises(PlanError, match=r"--split-max-size too small: token_embd\.weight alone has 560955392 bytes"):
        plan(real, types="Q8_0", split_max_bytes=10**8)


@pytest.mark.slow
def test_mtp_modes_divide_the_tensors(real: Workspace) -> None:
    keep, drop = plan(real, types="Q8_0"), plan(real, types="Q8_0", mtp=MtpMode.DROP)
    separate, only = (plan(real, types="Q8_0", mtp=mode) for mode in (MtpMode.SEPARATE, MtpMode.ONLY))
    assert [len(made.tensors) for made in (keep, drop, only)] == [805, 754, 55]
    assert [(f.path.name, len(f.tensors)) for f in separate.files] == [("out.gguf", 754), ("mtp-out.gguf", 55)]
    assert separate.files[0].header == drop.files[0].header


def test_the_first_matching_override_wins(real: Workspace) -> None:
    overrides = (parse_override(r"blk\.4[0-4]\.ffn_down_exps=q6_K"), parse_override("ffn_down_exps=Q5_K"))
    types = {t.mapped.name: t.ggml_type for t in plan(real, types="Q4_K_S", overrides=overrides).tensors}
    assert types["blk.44.ffn_down_exps.weight"] is T.Q6_K and types["blk.39.ffn_down_exps.weight"] is T.Q5_K
    assert types["blk.44.ffn_up_exps.weight"] is T.Q4_K


def test_an_override_never_touches_router_norms_or_biases(real: Workspace) -> None:
    made = plan(real, types="Q8_0", overrides=(parse_override(".*=Q4_K"),))
    assert {
        t.ggml_type for t in made.tensors if t.mapped.name.endswith(("norm.weight", "bias", "gate_inp.weight"))
    } == {T.F32}


def test_low_bit_types_without_an_imatrix_are_refused(real: Workspace) -> None:
    with pytest.raises(PlanError, match=r"imatrix needed: IQ2_XXS makes blk\.\d+\.\S+ IQ2_XXS \(\d+ such tensors\)"):
        plan(real, types="IQ2_XXS")


def test_any_ggml_type_can_be_named_for_all_matrices(real: Workspace) -> None:
    assert {t.ggml_type for t in plan(real, types="q4_k").tensors} == {T.Q4_K, T.F32}


@pytest.mark.parametrize("text", ["ffn", "=Q8_0", "(=Q8_0", "ffn=Q9"])
def test_a_bad_override_is_a_plan_error(text: str) -> None:
    with pytest.raises(PlanError):
        parse_override(text)
