"""Sampling: one program for many lengths, texts and settings; the same clips on any devices."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from constants import SHIPPED_GOLDEN
from golden_model import DECODING, clips, load_golden
from jax.experimental.compilation_cache import compilation_cache

from magnet_jax import programs
from magnet_jax.codec import decoding, encodec
from magnet_jax.config import (
    EditConfig,
    KernelConfig,
    SamplingMeshConfig,
    preset_steps,
)
from magnet_jax.decode import canvas, magnet, placement, sampling, tokens_of_text
from magnet_jax.errors import UserError
from magnet_jax.model import kernels


@pytest.fixture(scope="module")
def loaded():
    return load_golden()


@pytest.fixture(scope="module")
def decoder():
    return encodec.load_decoder(
        str(SHIPPED_GOLDEN / "encodec_tiny" / "compression_state_dict.bin"), num_codebooks=4
    )


def test_frames_go_in_few_buckets_and_the_usual_length_in_its_own():
    assert sampling.frame_bucket(501, usual=501, multiple=3) == 501
    buckets = {sampling.frame_bucket(n, usual=0, multiple=3) for n in range(256, 512)}
    assert len(buckets) == 9
    for n in range(1, 2000):
        bucket = sampling.frame_bucket(n, usual=0, multiple=6)
        assert n <= bucket <= 1.125 * n + 6
        assert bucket % 6 == 0


def test_texts_go_in_buckets(loaded):
    words = ["waltz " * count for count in (1, 20, 40, 500)]
    widths = [tokens_of_text.tokenize_texts(loaded, [text]).ids_BS.shape[1] for text in words]
    assert widths[0] == 16
    assert widths == sorted(widths)
    assert widths[-1] == 128
    assert set(widths) <= {16, 32, 64, 128}


def test_a_padded_clip_is_the_clip_of_its_own_length(loaded, decoder):
    """97 frames are 33 spans, decoded as 35 spans of which 33 exist; then as 33 spans."""
    num_frames = 97
    padded = clips(loaded, num_frames=num_frames, decoder=decoder)
    exact = clips(load_golden(num_frames / 50), num_frames=num_frames, decoder=decoder)
    np.testing.assert_array_equal(padded.codes_BKT, exact.codes_BKT)
    np.testing.assert_array_equal(padded.hidden_PBT, exact.hidden_PBT)
    assert padded.wav_BCN.shape == exact.wav_BCN.shape == (3, 1, num_frames * 640)
    np.testing.assert_allclose(padded.wav_BCN, exact.wav_BCN, atol=1e-5)


def test_overlapping_spans_of_a_padded_clip_are_those_of_its_own_length():
    decoding = dataclasses.replace(DECODING, span_arrangement="stride1")
    padded, exact = (
        clips(load_golden(seconds), num_frames=49, decoding=decoding) for seconds in (2.0, 0.98)
    )
    np.testing.assert_array_equal(padded.codes_BKT, exact.codes_BKT)


def test_one_program_serves_many_lengths_prompts_and_settings(loaded):
    programs.forget()
    lines = []
    execution = placement.Execution(say=lines.append)
    for i, (num_frames, num_prompt, guidance) in enumerate(
        [(65, 0, 10.0), (70, 0, 3.0), (68, 20, 10.0)]
    ):
        decoding = dataclasses.replace(DECODING, max_guidance=guidance, temperature=3.0 + i)
        prompt_BKP = np.full((3, 4, num_prompt), 7)
        found = clips(
            loaded, num_frames=num_frames, decoding=decoding, seed=i,
            given=canvas.beginning_with(prompt_BKP, num_frames),
            execution=execution,
        )  # fmt: skip
        assert found.codes_BKT.shape == (3, 4, num_frames)
        assert (found.codes_BKT < 128).all()
        assert (found.codes_BKT[..., :num_prompt] == 7).all()
    assert programs.count() == 1
    assert len(lines) == 2
    assert lines[0].startswith("preparing the program for 3 clips of 1.3 s")
    assert lines[1].startswith("ready in ")


def test_the_program_makes_the_audio_that_pytorch_makes(loaded, decoder):
    found = clips(loaded, decoder=decoder)
    torch_codec = encodec.load_codec(
        str(SHIPPED_GOLDEN / "encodec_tiny" / "compression_state_dict.bin"), num_codebooks=4
    )
    expected = decoding.decode_audio(torch_codec, found.codes_BKT)
    np.testing.assert_allclose(found.wav_BCN, expected, atol=1e-4)
    again = decoding.decode_audio(decoder, found.codes_BKT)
    np.testing.assert_allclose(found.wav_BCN, again, atol=1e-5)
    with pytest.raises(ValueError, match="must lie in"):
        decoding.decode_audio(decoder, np.full((1, 4, 3), 128))


def test_a_clip_without_text_is_the_same_beside_others_and_alone(loaded):
    """Alone, no row has text: neither cross-attention nor guidance is computed."""
    both = clips(loaded).codes_BKT
    alone = clips(loaded, [""], first_sample=1).codes_BKT
    np.testing.assert_array_equal(both[1], alone[0])


@pytest.mark.parametrize(
    "mesh",
    [
        SamplingMeshConfig(data=2),
        SamplingMeshConfig(guidance=2),
        SamplingMeshConfig(frames=4),
        SamplingMeshConfig(data=-1, guidance=2, frames=2),
    ],
    ids=lambda mesh: f"{mesh.data},{mesh.guidance},{mesh.frames}",
)
def test_clips_are_the_same_on_any_mesh(loaded, decoder, mesh):
    """Three clips, which two devices do not divide, of 100 frames, which four spans do not."""
    one = clips(loaded, decoder=decoder)
    many = clips(loaded, decoder=decoder, execution=placement.Execution(mesh=mesh))
    np.testing.assert_array_equal(one.codes_BKT, many.codes_BKT)
    np.testing.assert_array_equal(one.hidden_PBT, many.hidden_PBT)
    np.testing.assert_allclose(one.wav_BCN, many.wav_BCN, atol=1e-5)


def see_near_frames(loaded, first_context):
    model = dataclasses.replace(loaded.config.model, first_context=first_context)
    return loaded._replace(config=dataclasses.replace(loaded.config, model=model))


def test_a_first_codebook_that_sees_near_frames_is_the_same_on_a_mesh(loaded):
    mesh = SamplingMeshConfig(guidance=2, frames=4)
    near = see_near_frames(loaded, 9)
    one = clips(near).codes_BKT
    many = clips(near, execution=placement.Execution(mesh=mesh)).codes_BKT
    np.testing.assert_array_equal(one, many)
    assert (one[:, 0] != clips(loaded).codes_BKT[:, 0]).any()
    with pytest.raises(UserError, match="frames a device, fewer than the 40 seen to each side"):
        clips(see_near_frames(loaded, 40), execution=placement.Execution(mesh=mesh))


def test_edits_are_the_same_on_any_mesh_and_in_any_window(loaded):
    """Of clips whose last span is cut: a region before it, one up to the end, and one that ends
    within that span.
    """
    rng, width = np.random.default_rng(0), 9
    given_BKT = np.ones((3, 4, 100), bool)
    for given_KT, first in zip(given_BKT, (84, 100 - width, 98 - width)):
        given_KT[:, first : first + width] = False
    codes_BKT = rng.integers(0, 128, given_BKT.shape)
    found = []
    for mesh, whole in (
        ({}, True),
        ({}, False),
        ({"data": 2}, False),
        ({"data": 2, "guidance": 2, "frames": 2}, False),
    ):
        savings = magnet.Savings(last_window=not whole)
        execution = placement.Execution(mesh=SamplingMeshConfig(**mesh), savings=savings)
        found.append(
            clips(
                loaded, given=canvas.Canvas(codes_BKT, given_BKT), editing=EditConfig(),
                execution=execution,
            ).codes_BKT
        )  # fmt: skip
    for made_BKT in found:
        np.testing.assert_array_equal(made_BKT, found[0])
    np.testing.assert_array_equal(found[0][given_BKT], codes_BKT[given_BKT])
    assert ((found[0] != codes_BKT).mean((1, 2)) > 0.05).all()


def test_a_mesh_that_does_not_fit_is_refused(loaded):
    for mesh, message in (
        (SamplingMeshConfig(data=9), "needs 9 devices; there are 8"),
        (SamplingMeshConfig(frames=8), "leaves 3 frames a device, fewer than the 5"),
    ):
        with pytest.raises(UserError, match=message):
            clips(loaded, num_frames=24, execution=placement.Execution(mesh=mesh))
    with pytest.raises(UserError, match="mesh.data must be positive"):
        SamplingMeshConfig(data=0)


def test_weights_are_rounded_once_where_products_are_rounded(loaded):
    config = dataclasses.replace(loaded.config, compute_dtype="bfloat16")
    loaded = loaded._replace(config=config)
    prepared = placement.prepare(loaded)
    assert prepared.params["lm"]["blocks"]["mlp"]["up"].dtype == jax.numpy.bfloat16
    assert prepared.params["lm"]["blocks"]["norm_mlp"]["scale"].dtype == jax.numpy.float32
    np.testing.assert_array_equal(clips(prepared).codes_BKT, clips(loaded).codes_BKT)


def test_presets_name_decoding_steps():
    assert preset_steps("balanced", 4) == (20, 5, 5, 5)
    assert preset_steps("draft", 5) == (20, 1, 1, 1, 1) and preset_steps("paper", 1) == (20,)
    with pytest.raises(UserError, match="one of paper, paper-30s, balanced, draft, not 'fast'"):
        preset_steps("fast", 4)


def test_kernels_asked_for_are_used(loaded, monkeypatch):
    used = []
    attend = kernels.attend

    def spy(*qkv, kernel, context, **settings):
        used.append((context, kernel))
        return attend(*qkv, kernel=kernel, context=context, **settings)

    default = clips(loaded).codes_BKT
    monkeypatch.setattr(kernels, "attend", spy)
    programs.forget()
    jax.clear_caches()  # or what was traced before would be taken
    execution = placement.Execution(kernels=KernelConfig(full="blocks", local="slices"))
    np.testing.assert_array_equal(clips(loaded, execution=execution).codes_BKT, default)
    assert set(used) == {(None, "blocks"), (5, "slices")}


def test_compiled_programs_are_kept_on_disk_where_the_user_says(monkeypatch, tmp_path):
    """The tests' own folder, given by the environment, is left alone; by default there is one."""
    given = jax.config.jax_compilation_cache_dir
    least = jax.config.jax_persistent_cache_min_compile_time_secs
    programs.keep_on_disk()
    assert jax.config.jax_compilation_cache_dir == given
    monkeypatch.setattr(programs.platformdirs, "user_cache_dir", lambda name: str(tmp_path / name))
    try:
        jax.config.update("jax_compilation_cache_dir", None)
        programs.keep_on_disk()
        folder = tmp_path / "magnet_jax" / "programs"
        assert jax.config.jax_compilation_cache_dir == str(folder)
        compilation_cache.reset_cache()
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
        programs.call(jax.jit(lambda x: jnp.sin(x) + 1), jnp.ones(3), what="a sum")
        assert list(folder.glob("*-cache"))
    finally:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", least)
        jax.config.update("jax_compilation_cache_dir", given)
        jax.config.update("jax_compilation_cache_max_size", -1)
        compilation_cache.reset_cache()


# --- what is given ------------------------------------------------------------------------------


def test_a_hole_has_all_steps_to_itself_where_the_last_span_is_cut(loaded):
    """100 frames of a clip are decoded as 102; the span of the last ones is otherwise given."""
    rng = np.random.default_rng(0)
    given = canvas.Canvas(rng.integers(0, 128, (3, 4, 100)), np.ones((3, 4, 100), bool))
    given.given_BKT[:, :, 48:51] = False
    found = clips(loaded, given=given)
    np.testing.assert_array_equal(
        found.codes_BKT[given.given_BKT], given.codes_BKT[given.given_BKT]
    )
    assert (found.codes_BKT < 128).all()
    assert found.hidden_PBT[:, :, 48:51].all()  # at every step
    everything = given._replace(given_BKT=np.ones((3, 4, 100), bool))
    np.testing.assert_array_equal(clips(loaded, given=everything).codes_BKT, given.codes_BKT)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda codes, given: (codes[:, :1], given[:, :1]), "must be .3 clips, 4 codebooks"),
        (lambda codes, given: (codes[:2], given[:2]), "must be .3 clips, 4 codebooks"),
        (lambda codes, given: (codes + 128, given), "between 0 and 127, not 128 to 128"),
        (lambda codes, given: (codes - 1, given), "between 0 and 127, not -1 to -1"),
        (lambda codes, given: (codes, given.astype(int)), "given bool, not int64"),
        (lambda codes, given: (codes + 0.5, given), "whole numbers, not float64"),
        (
            lambda *both: tuple(np.concatenate([x, x], axis=-1) for x in both),
            "given beyond the clip, which has 100 frames",
        ),
    ],
)
def test_what_is_given_must_fit(loaded, change, message):
    codes_BKT, given_BKT = np.zeros((3, 4, 100), int), np.ones((3, 4, 100), bool)
    with pytest.raises(UserError, match=message):
        clips(loaded, given=canvas.Canvas(*change(codes_BKT, given_BKT)))
