"""Building a safety profile on the tiny model: parts, resumption, and refusing bad directions."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from jobs.profile import HarmfulInputsConfig, ProfileConfig, RefusalsConfig, build_profile
from jobs.profile.harmful_inputs import build_harmful_inputs
from jobs.profile.own_prompts import Given
from safeft.constraints.covariance import InputCovariances, input_sites, read_row
from safeft.constraints.subspaces import (
    POSITIONS,
    Positions,
    load_subspaces,
    principal_subspace,
)
from safeft.errors import InputError, ProfileError
from safeft.fit import FitConfig
from safeft.models import load_model, load_tokenizer, weights_hash
from safeft.own_refusals import OwnRefusal, load_answers, load_refusals
from safeft.profile import SafetyProfile
from safeft.prompts import KINDS, Kind, Prompt, load_prompts, spread
from safeft.sae_config import AutoencoderConfig
from tests.tiny import save_tiny
from tests.tinyprofile import write_profile

SHORT = FitConfig(rank=2, alpha=4, batch_size=4, steps=2)
CONFIG = ProfileConfig(safety=SHORT, danger=SHORT, prompts=8, steering=4, calibration=8)
#: Two steps on random weights do not steer.
UNFIT = "does not steer"
BEFORE_STEERING = ("alignment", "safety-direction", "danger-direction")


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    return save_tiny(tmp_path / "aligned", seed=1), save_tiny(tmp_path / "unaligned", seed=2)


def records(profile: SafetyProfile) -> dict[str, int]:
    """When each finished part was written."""
    return {p.parent.name: p.stat().st_mtime_ns for p in profile.root.glob("*/part.json")}


def test_a_model_whose_directions_do_not_steer_gets_no_profile(pair: tuple[Path, Path]) -> None:
    with pytest.raises(ProfileError, match=UNFIT):
        build_profile(*pair, config=CONFIG)
    profile = SafetyProfile.for_weights(weights_hash(pair[0]))
    assert set(records(profile)) == set(BEFORE_STEERING)
    with pytest.raises(ProfileError, match="lacks 'steering'"):
        profile.verify()


def test_a_build_that_was_interrupted_goes_on_and_keeps_what_was_finished(
    pair: tuple[Path, Path],
) -> None:
    def interrupt(label: str, done: int, total: int | None) -> None:
        if label == "profile: danger direction" and done == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_profile(*pair, config=CONFIG, progress=interrupt)
    profile = SafetyProfile.for_weights(weights_hash(pair[0]))
    first = records(profile)
    assert set(first) == {"alignment", "safety-direction"}
    with pytest.raises(ProfileError, match=UNFIT):
        build_profile(*pair, config=CONFIG)
    assert first.items() <= records(profile).items()


def test_other_settings_rebuild_the_parts_that_depend_on_them(pair: tuple[Path, Path]) -> None:
    other = replace(CONFIG, danger=replace(SHORT, steps=3))
    for config in (CONFIG, other):
        with pytest.raises(ProfileError, match=UNFIT):
            build_profile(*pair, config=config)
        profile = SafetyProfile.for_weights(weights_hash(pair[0]))
        if config is CONFIG:
            first = records(profile)
    assert records(profile)["alignment"] == first["alignment"]
    assert records(profile)["danger-direction"] > first["danger-direction"]


def test_other_prompts_rebuild_the_directions(
    pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ProfileError, match=UNFIT):
        build_profile(*pair, config=CONFIG)
    profile = SafetyProfile.for_weights(weights_hash(pair[0]))
    first = records(profile)
    shorter = {kind: load_prompts(kind, "profile")[:-8] for kind in KINDS}
    for module in ("jobs.profile.part", "safeft.reference_rows"):
        monkeypatch.setattr(f"{module}.load_prompts", lambda kind, split: shorter[kind])
    with pytest.raises(ProfileError, match=UNFIT):
        build_profile(*pair, config=CONFIG)
    assert records(profile)["safety-direction"] > first["safety-direction"]


def test_parts_of_an_older_version_are_removed(pair: tuple[Path, Path]) -> None:
    profile = SafetyProfile.for_weights(weights_hash(pair[0]))
    old = profile.root / "danger-state"
    old.mkdir(parents=True)
    profile.write_record(old, {})
    with pytest.raises(ProfileError, match=UNFIT):
        build_profile(*pair, config=CONFIG)
    assert not old.exists()


# ---- the parts that CWAC needs ----

REFUSES = replace(CONFIG, refusals=RefusalsConfig(prompts=20))
REFUSAL = "I can't help with that."


@pytest.fixture
def refusing(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Random weights refuse nothing, so the model is made to; holds how often it was asked."""
    asked: list[int] = []

    def generate(_: Any, __: Any, prompts: list[str], **___: Any) -> list[str]:
        asked.append(len(prompts))
        return [REFUSAL] * len(prompts)

    monkeypatch.setattr("safeft.own_refusals.generate_greedy", generate)
    return asked


def some_refusals(count: int) -> list[OwnRefusal]:
    prompts = spread(load_prompts("harmful", "profile"), count)
    return [OwnRefusal(p.text, REFUSAL[: 5 + i % 15]) for i, p in enumerate(prompts)]


def harmful_inputs(model_dir: Path, out: Path, energy: float, **options: Any) -> Path:
    out.mkdir()
    build_harmful_inputs(
        model_dir, some_refusals(24), out, base_weights="w", energy=energy, **options
    )
    return out


def covariance(directory: Path, module: str, positions: Positions) -> Tensor:
    """C, put together again from all of its eigenvectors."""
    loaded = load_subspaces(directory)
    U = loaded.basis(module, positions, 1.0, None).double()
    site = next(site for site in loaded.sites if module in site.modules)
    values = load_file(directory / site.file)[f"{positions}.eigenvalues"]
    return U @ torch.diag(values) @ U.T


def test_harmful_inputs_do_not_depend_on_the_number_of_workers_or_passes(
    tiny_dir: Path, tmp_path: Path, local_ray: None
) -> None:
    one = harmful_inputs(tiny_dir, tmp_path / "one", 1.0)
    # Room for the covariances of little more than a layer: 2 passes over the prompts.
    two = harmful_inputs(tiny_dir, tmp_path / "two", 1.0, workers=2, memory=200_000)
    tokenizer, model = load_tokenizer(tiny_dir), load_model(tiny_dir)
    rows = [read_row(tokenizer, refusal) for refusal in some_refusals(24)]
    sums = InputCovariances(input_sites(model, rows[0].input_ids))
    for row in rows:
        sums.read(model, [row], tokenizer.pad_token_id)
    assert [s.modules for s in load_subspaces(two).sites] == [
        s.modules for s in sums.sites.values()
    ]
    for site in sums.sites.values():
        for positions in POSITIONS:
            expected = sums.total(site.name, positions)
            for directory in (one, two):
                got = covariance(directory, site.modules[-1], positions)
                assert float((got - expected.matrix).norm() / expected.matrix.norm()) < 1e-6
                saved = next(
                    s for s in load_subspaces(directory).sites if s.modules[0] == site.name
                )
                assert saved.sizes[positions].tokens == expected.tokens
            # As far as the cut is between eigenvalues that rounding does not swap, so do subspaces.
            U = principal_subspace(expected, 0.9).U
            both = [load_subspaces(d).basis(site.name, positions, 0.9, None) for d in (one, two)]
            for other in both:
                assert other.shape == U.shape
                torch.testing.assert_close(other @ other.T, U @ U.T, rtol=0, atol=1e-3)


def test_more_workers_than_processors_are_refused(
    tiny_dir: Path, tmp_path: Path, local_ray: None
) -> None:
    with pytest.raises(InputError, match="--workers: 3 do not fit on 2 processors"):
        harmful_inputs(tiny_dir, tmp_path / "out", 0.9, workers=3)


def test_a_worker_that_finds_no_numbers_ends_the_build_with_the_layers_name(
    tmp_path: Path, local_ray: None
) -> None:
    model_dir = save_tiny(tmp_path / "broken")
    model = load_model(model_dir)
    model.model.layers[1].self_attn.v_proj.weight.data.fill_(torch.nan)
    model.save_pretrained(model_dir)
    with pytest.raises(ProfileError, match=r"layers\.1\.self_attn\.o_proj: .*NaN"):
        harmful_inputs(model_dir, tmp_path / "out", 0.9)


def test_a_named_part_is_built_with_what_it_is_made_from_and_nothing_else(
    tiny_dir: Path, refusing: list[int], local_ray: None
) -> None:
    profile = build_profile(tiny_dir, None, config=REFUSES, parts=["harmful-inputs"])
    assert set(records(profile)) == {"refusals", "harmful-inputs"}
    refusals = load_refusals(profile.path("refusals"))
    prompts = spread(load_prompts("harmful", "profile"), 20)
    assert refusals == [OwnRefusal(p.text, REFUSAL) for p in prompts]
    subspaces = load_subspaces(profile.path("harmful-inputs"))
    assert (subspaces.base_weights, subspaces.rows) == (profile.base_weights, 20)
    assert subspaces.basis("model.layers.1.mlp.down_proj", "both", 0.99, None).shape[0] == 64
    profile.verify(["refusals", "harmful-inputs"])

    first = records(profile)
    more = replace(REFUSES, harmful_inputs=HarmfulInputsConfig(energy=0.999))
    build_profile(tiny_dir, None, config=more, parts=["harmful-inputs"])
    assert refusing == [20]
    assert records(profile)["refusals"] == first["refusals"]
    assert records(profile)["harmful-inputs"] > first["harmful-inputs"]
    assert load_subspaces(profile.path("harmful-inputs")).energy == 0.999

    # Other refusals: what was read at them is no longer of this profile.
    fewer = replace(REFUSES, refusals=RefusalsConfig(prompts=18))
    build_profile(tiny_dir, None, config=fewer, parts=["refusals"])
    with pytest.raises(ProfileError, match=r"another 'refusals'.*--part harmful-inputs"):
        profile.verify(["harmful-inputs"])


def test_parts_for_constraints_leave_the_screening_digest_as_it_was(
    tiny_dir: Path, tmp_path: Path, refusing: list[int]
) -> None:
    profile = write_profile(tiny_dir, save_tiny(tmp_path / "unaligned", seed=1), threshold=0.0)
    before = profile.digest()
    build_profile(tiny_dir, None, config=REFUSES, parts=["refusals"])
    assert "refusals" in records(profile)
    assert profile.digest() == before
    profile.verify()


def test_a_model_that_does_not_refuse_gets_no_refusals(
    tiny_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "safeft.own_refusals.generate_greedy",
        lambda _, __, prompts, **___: ["Sure!"] * len(prompts),
    )
    with pytest.raises(ProfileError, match="refuses only 0 of 20 harmful prompts"):
        build_profile(tiny_dir, None, config=REFUSES, parts=["refusals"])
    assert not records(SafetyProfile.for_weights(weights_hash(tiny_dir)))


def test_screening_parts_do_not_depend_on_the_settings_of_the_others(
    pair: tuple[Path, Path],
) -> None:
    other = replace(
        CONFIG, refusals=RefusalsConfig(prompts=7), harmful_inputs=HarmfulInputsConfig(0.5)
    )
    profile = SafetyProfile.for_weights(weights_hash(pair[0]))
    for config in (CONFIG, other):
        build_profile(*pair, config=config, parts=["danger-direction"])
        if config is CONFIG:
            first = records(profile)
    assert set(first) == {"safety-direction", "danger-direction"}
    assert records(profile) == first


def test_a_part_that_no_profile_has_is_refused(tiny_dir: Path) -> None:
    with pytest.raises(InputError, match=r"no part 'refusal' .*refusals"):
        build_profile(tiny_dir, None, parts=["refusal"])


def test_an_alignment_direction_without_the_unaligned_model_is_refused(tiny_dir: Path) -> None:
    with pytest.raises(ProfileError, match="--unaligned"):
        build_profile(tiny_dir, None, parts=["alignment"])


def test_an_import_without_the_part_that_takes_it_is_refused(
    tiny_dir: Path, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match="'autoencoder'"):
        build_profile(tiny_dir, None, parts=["refusals"], import_sae=tmp_path)


OWN = [Prompt(f"Do harm, in way {i}.", "own", "profile") for i in range(18)]


def test_own_prompts_are_what_the_model_is_asked_until_others_are_given(
    tiny_dir: Path, refusing: list[int]
) -> None:
    def asked(prompts: Given | None = None) -> set[str]:
        profile = build_profile(tiny_dir, None, config=REFUSES, parts=["refusals"], prompts=prompts)
        return {refusal.prompt for refusal in load_refusals(profile.path("refusals"))}

    packaged = asked()
    assert packaged <= {p.text for p in load_prompts("harmful", "profile")}
    assert asked({"harmful": OWN}) == {p.text for p in OWN}
    assert asked() == {p.text for p in OWN}
    assert asked({"harmful": OWN[1:]}) == {p.text for p in OWN[1:]}
    assert asked({"harmful": None}) == packaged
    assert asked() == packaged
    assert refusing == [20, 18, 17, 20]


def test_a_prompt_in_two_kinds_and_a_damaged_memory_of_prompts_are_named(tiny_dir: Path) -> None:
    with pytest.raises(InputError, match="borderline has one that another kind has: 'Do harm"):
        build_profile(
            tiny_dir, None, parts=["refusals"], prompts={"harmful": OWN, "borderline": OWN[:1]}
        )
    profile = SafetyProfile.for_weights(weights_hash(tiny_dir))
    profile.root.mkdir(parents=True, exist_ok=True)
    (profile.root / "own-prompts.json").write_text("{")
    with pytest.raises(ProfileError, match=r"own-prompts\.json: cannot be read"):
        build_profile(tiny_dir, None, parts=["refusals"])


def test_every_part_of_constraints_and_restorations_asks_the_own_prompts(
    tiny_dir: Path, tmp_path: Path, local_ray: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    heard: set[str] = set()

    def speaks(_: Any, __: Any, prompts: list[str], **___: Any) -> list[str]:
        heard.update(prompts)
        return [REFUSAL if "harm" in prompt else "Like this: begin." for prompt in prompts]

    for module in ("safeft.own_refusals", "safeft.evaluate.refusals"):
        monkeypatch.setattr(f"{module}.generate_greedy", speaks)
    own: dict[Kind, list[Prompt]] = {
        "harmful": OWN,
        "benign": [Prompt(f"Name town {i}.", "own", "profile") for i in range(6)],
        "borderline": [Prompt(f"How do I kill weed {i}?", "own", "profile") for i in range(6)],
    }
    read: list[list[str]] = []

    def mask(_: Any, __: Any, domain: list[list[int]], *___: Any) -> dict[str, Tensor]:
        read.append(sorted(load_tokenizer(tiny_dir).decode(ids) for ids in domain))
        raise ProfileError("seen")

    parts = ["answers", "benign-inputs", "held-states"]
    profile = build_profile(tiny_dir, None, config=REFUSES, parts=parts, prompts=own)
    assert heard == {p.text for prompts in own.values() for p in prompts}
    assert {one.prompt for one in load_answers(profile.path("answers"))} == {
        p.text for kind in ("benign", "borderline") for p in own[kind]
    }
    monkeypatch.setattr("jobs.profile.restore_parts.pruning_mask", mask)
    with pytest.raises(ProfileError, match="seen"):
        build_profile(tiny_dir, None, config=REFUSES, parts=["reference-mask"])
    assert len(read[0]) == 6 and all("Name town" in text for text in read[0])


def test_the_autoencoder_is_bound_to_its_settings_the_refusals_and_the_import(
    tiny_dir: Path, tmp_path: Path, refusing: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[tuple[Path, Any, Path | None]] = []

    def build_autoencoder(
        model_dir: Path,
        refusals: Path,
        out: Path,
        config: Any,
        _: Any,
        *,
        prompts: dict[Kind, list[Prompt]],
        import_from: Path | None,
    ) -> None:
        assert load_refusals(refusals) and set(prompts) == set(KINDS)
        (out / "sae.json").write_text("{}")
        made.append((model_dir, config, import_from))

    monkeypatch.setattr("jobs.profile.autoencoder.build_autoencoder", build_autoencoder)
    given = tmp_path / "sae"
    given.mkdir()
    (given / "cfg.json").write_text("{}")

    def build(steps: int, imported: Path | None = None) -> None:
        config = replace(REFUSES, autoencoder=AutoencoderConfig(steps=steps))
        build_profile(tiny_dir, None, config=config, parts=["autoencoder"], import_sae=imported)

    build(8)
    build(8)
    build(16)
    build(16, given)
    (given / "cfg.json").write_text("{ }")
    build(16, given)
    build(16, given)
    assert made == [
        (tiny_dir, AutoencoderConfig(steps=8), None),
        (tiny_dir, AutoencoderConfig(steps=16), None),
        (tiny_dir, AutoencoderConfig(steps=16), given),
        (tiny_dir, AutoencoderConfig(steps=16), given),
    ]
    assert refusing == [20]
