"""What programs cost, of programs whose cost is known to the last operation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, PartitionSpec

from launch.compile import hlo
from launch.compile.hlo import Array


def work(function, *arguments) -> hlo.Work:
    return hlo.work(jax.jit(function).lower(*arguments).compile().as_text())


def ones(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


def product(m, k, n):
    return 2 * m * k * n


def test_nested_scans_multiply():
    def layer(x, weight):
        return jnp.tanh(x @ weight), None

    def network(x, weights):
        step = lambda x, _: (jax.lax.scan(layer, x, weights)[0], None)  # noqa: E731
        return jax.lax.scan(step, x, length=7)[0]

    found = work(network, ones(48, 32), ones(5, 32, 32))
    assert found.flops == 7 * 5 * product(48, 32, 32)
    assert found.unknown_loops == () and found.uncounted == {} and found.cycles is None


def test_batched_and_contracted_axes_of_dots():
    def attention(q, k, v):
        scores = jnp.einsum("btnh,bsnh->bnts", q, k)
        return jnp.einsum("bnts,bsnh->btnh", jax.nn.softmax(scores), v)

    found = work(attention, ones(2, 40, 3, 8), ones(2, 24, 3, 8), ones(2, 24, 3, 8))
    assert found.flops == 2 * 2 * 3 * product(40, 8, 24)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_precision_changes_nothing(dtype):
    found = work(lambda a, b: a @ b, ones(64, 48, dtype=dtype), ones(48, 80, dtype=dtype))
    assert found.flops == product(64, 48, 80)


def test_a_loop_that_ends_by_its_data_is_counted_once_and_named():
    def network(x, weight):
        return jax.lax.while_loop(lambda x: x.sum() < 1e3, lambda x: x @ weight, x)

    found = work(network, ones(16, 16), ones(16, 16))
    assert found.flops == product(16, 16, 16)
    assert len(found.unknown_loops) == 1


def test_the_dearest_branch_counts():
    def network(index, x, y):
        few = lambda: x @ x  # noqa: E731
        many = lambda: x @ y @ y.T  # noqa: E731
        return jax.lax.switch(index, [few, many, lambda: x])

    found = work(network, ones(dtype=jnp.int32), ones(32, 32), ones(32, 96))
    assert found.flops == product(32, 32, 96) + product(32, 96, 32)


def convolution_in_python(lhs: int, kernel: int, stride: int, low: int, high: int, dilation: int):
    """Multiply-adds of one channel that meet a number."""
    padded = np.zeros(low + (lhs - 1) * dilation + 1 + high, int)
    padded[low : len(padded) - high : dilation] = 1
    return sum(padded[i : i + kernel].sum() for i in range(0, len(padded) - kernel + 1, stride))


@pytest.mark.parametrize("transposed", [False, True])
def test_convolutions_count_neither_padding_nor_holes(transposed):
    stride, dilation = (1, 3) if transposed else (2, 1)

    def network(x, kernel):
        return jax.lax.conv_general_dilated(
            x, kernel, (stride,), [(2, 3)], lhs_dilation=(dilation,),
            dimension_numbers=("NWC", "WIO", "NWC"),
        )  # fmt: skip

    found = work(network, ones(2, 31, 6), ones(5, 6, 4))
    assert found.flops == 2 * 2 * 6 * 4 * convolution_in_python(31, 5, stride, 2, 3, dilation)


def test_grouped_convolutions():
    def network(x, kernel):
        return jax.lax.conv_general_dilated(
            x, kernel, (1,), "VALID", feature_group_count=3,
            dimension_numbers=("NWC", "WIO", "NWC"),
        )  # fmt: skip

    found = work(network, ones(2, 20, 6), ones(5, 2, 9))
    assert found.flops == 2 * 2 * 16 * 5 * 2 * 9


def test_collectives_are_counted_by_kind():
    mesh = Mesh(np.asarray(jax.devices()[:4]), ("x",), axis_types=(AxisType.Auto,))
    spec = PartitionSpec("x")

    def step(x, _):
        return x + jax.lax.psum(x, "x"), None

    def network(x):
        x = jax.lax.scan(step, x, length=6)[0]
        return jax.lax.all_gather(x, "x")

    network = jax.shard_map(network, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)
    found = work(network, ones(4, 32))
    assert found.collective_runs == {"all-gather": 1, "all-reduce": 6}
    assert found.collective_places == {"all-gather": 1, "all-reduce": 1}
    assert found.collective_bytes == {"all-gather": 4 * 32 * 4, "all-reduce": 6 * 32 * 4}


def test_memory_is_the_compilers():
    compiled = jax.jit(lambda a, b: a @ b).lower(ones(64, 32), ones(32, 16)).compile()
    found = hlo.costs(compiled)
    assert found.argument_bytes == 4 * (64 * 32 + 32 * 16)
    assert found.output_bytes == 4 * 64 * 16
    assert found.flops == product(64, 32, 16)
    assert found.peak_bytes > 0


def test_square_arrays_are_found():
    def scores(x, weight):
        square = x @ x.T
        return jnp.sort(square, -1) @ (x @ weight)

    text = jax.jit(scores).lower(ones(96, 8), ones(8, 200)).compile().as_text()
    (square, wide) = sorted(hlo.square_arrays(text, 96), key=lambda use: use.array.bytes)
    assert (str(square.array), str(wide.array)) == ("f32[96,96]", "f32[96,200]")
    assert square.in_memory
    assert [use.array for use in hlo.square_arrays(text, 96, at_most=128)] == [square.array]
    assert not hlo.square_arrays(text, 97)
    assert hlo.largest_arrays(text, 1)[0].array == wide.array


# What CPUs do not print: programs of TPUs and GPUs, cut down to what matters.

TPU_LOOPS = """HloModule loops, is_scheduled=true

%product (a: bf16[8,16], b: bf16[16,4]) -> bf16[8,4] {
  %a = bf16[8,16]{1,0:T(8,128)(2,1)} parameter(0)
  %b = bf16[16,4]{1,0:T(8,128)(2,1)} parameter(1)
  ROOT %c = bf16[8,4]{1,0:T(8,128)(2,1)S(1)} convolution(%a, %b), dim_labels=bf_io->bf
}

%inner_body (s: (s32[], bf16[8,16], bf16[16,4], s32[])) -> (s32[], bf16[8,16], bf16[16,4], s32[]) {
  %s = (s32[]{:T(128)}, bf16[8,16]{1,0}, bf16[16,4]{1,0}, s32[]{:T(128)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%s), index=0
  %x = bf16[8,16]{1,0} get-tuple-element(%s), index=1
  %w = bf16[16,4]{1,0} get-tuple-element(%s), index=2
  %limit = s32[]{:T(128)} get-tuple-element(%s), index=3
  %two = s32[]{:T(128)} constant(2)
  %next = s32[]{:T(128)} add(%i, %two)
  %moved = bf16[8,16]{0,1} copy(%x), backend_config={"window_config":{"estimated_cycles":"10"}}
  %y = bf16[8,4]{1,0:T(8,128)(2,1)S(1)} fusion(%x, %w), kind=kOutput, calls=%product, metadata={op_name="jit(f), body=%product"}, backend_config={"window_config":{"estimated_cycles":"100"}}
  ROOT %out = (s32[]{:T(128)}, bf16[8,16]{1,0}, bf16[16,4]{1,0}, s32[]{:T(128)}) tuple(%next, %x, %w, %limit)
}

%inner_condition (s: (s32[], bf16[8,16], bf16[16,4], s32[])) -> pred[] {
  %s = (s32[]{:T(128)}, bf16[8,16]{1,0}, bf16[16,4]{1,0}, s32[]{:T(128)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%s), index=0
  %limit = s32[]{:T(128)} get-tuple-element(%s), index=3
  ROOT %go = pred[]{:T(512)} compare(%i, %limit), direction=LT
}

%body (s: (s32[], (bf16[8,16], bf16[16,4]), s32[])) -> (s32[], (bf16[8,16], bf16[16,4]), s32[]) {
  %s = (s32[]{:T(128)}, (bf16[8,16]{1,0}, bf16[16,4]{1,0}), s32[]{:T(128)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%s), index=0
  %pair = (bf16[8,16]{1,0}, bf16[16,4]{1,0}) get-tuple-element(%s), index=1
  %x = bf16[8,16]{1,0} get-tuple-element(%pair), index=0
  %w = bf16[16,4]{1,0} get-tuple-element(%pair), index=1
  %limit = s32[]{:T(128)} get-tuple-element(%s), index=2
  %minus = s32[]{:T(128)} constant(-1)
  %next = s32[]{:T(128)} add(%i, %minus)
  %zero = s32[]{:T(128)} constant(0)
  %state = (s32[]{:T(128)}, bf16[8,16]{1,0}, bf16[16,4]{1,0}, s32[]{:T(128)}) tuple(%zero, %x, %w, %limit)
  %loop = (s32[]{:T(128)}, bf16[8,16]{1,0}, bf16[16,4]{1,0}, s32[]{:T(128)}) while(%state), condition=%inner_condition, body=%inner_body
  ROOT %out = (s32[]{:T(128)}, (bf16[8,16]{1,0}, bf16[16,4]{1,0}), s32[]{:T(128)}) tuple(%next, %pair, %limit)
}

%condition (s: (s32[], (bf16[8,16], bf16[16,4]), s32[])) -> pred[] {
  %s = (s32[]{:T(128)}, (bf16[8,16]{1,0}, bf16[16,4]{1,0}), s32[]{:T(128)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%s), index=0
  %zero = s32[]{:T(128)} constant(0)
  ROOT %go = pred[]{:T(512)} compare(%i, %zero), direction=GT
}

ENTRY %main (x: bf16[8,16], w: bf16[16,4]) -> (s32[], (bf16[8,16], bf16[16,4]), s32[]) {
  %x = bf16[8,16]{1,0} parameter(0)
  %w = bf16[16,4]{1,0} parameter(1)
  %pair = (bf16[8,16]{1,0}, bf16[16,4]{1,0}) tuple(%x, %w)
  %three = s32[]{:T(128)} constant(3)
  %copied = s32[]{:T(128)S(6)} copy(%three)
  %limit = s32[]{:T(128)} constant(9)
  %state = (s32[]{:T(128)}, (bf16[8,16]{1,0}, bf16[16,4]{1,0}), s32[]{:T(128)}) tuple(%copied, %pair, %limit)
  ROOT %loop = (s32[]{:T(128)}, (bf16[8,16]{1,0}, bf16[16,4]{1,0}), s32[]{:T(128)}) while(%state), condition=%condition, body=%body
}
"""  # noqa: E501


def test_trip_counts_come_from_the_counters():
    # 3 rounds downwards, each of 5 in steps of two up to a limit handed down through both states.
    found = hlo.work(TPU_LOOPS)
    assert found.flops == 3 * 5 * product(8, 16, 4)
    assert found.cycles == 3 * 5 * 110
    assert (found.copy_places, found.copy_runs, found.copy_bytes) == (1, 15, 15 * 8 * 16 * 2)
    assert found.unknown_loops == ()


def test_a_counter_from_outside_is_unknown():
    text = TPU_LOOPS.replace("%limit = s32[]{:T(128)} constant(9)", "%limit = s32[] parameter(2)")
    found = hlo.work(text)
    assert found.unknown_loops == ("loop",)
    assert found.flops == 3 * product(8, 16, 4)


def entry(*lines: str) -> str:
    return "HloModule m\n\nENTRY %main () -> f32[] {\n" + "".join(f"  {x}\n" for x in lines) + "}\n"


def test_tpu_products_with_batch_axes_are_dilated_convolutions():
    text = entry(
        "%q = bf16[2,40,4,64]{1,3,2,0:T(8,128)(2,1)} parameter(0)",
        "%k = bf16[2,24,4,64]{1,3,2,0:T(8,128)(2,1)} parameter(1)",
        "ROOT %s = f32[2,4,40,24]{2,3,1,0:T(8,128)S(1)} convolution(%q, %k), "
        "window={size=2x4 stride=1x3 lhs_dilate=2x4}, dim_labels=0b1f_0o1i->01bf",
    )
    assert hlo.work(text).flops == 2 * 4 * product(40, 64, 24)


def kernel(name: str, config: str = "{}") -> str:
    """A Pallas kernel with masks before its operands, and attributes that break their line."""
    array = "bf16[2,4,512,64]{3,2,1,0:T(8,128)(2,1)}"
    return entry(
        "%m = s8[1,2,2]{2,1,0} parameter(0)",
        *(f"%{x} = {array} parameter({i})" for i, x in enumerate("qkv", 1)),
        f"ROOT %{name}.1 = ({array}, f32[2,256,128]{{2,1,0}}) custom-call(%m, %q, %k, %v), "
        'custom_call_target="tpu_custom_call", frontend_attributes={kernel_metadata={\n'
        '"xprof_metadata":"{\\"block_q\\": 256}"\n'
        f'}}}}, metadata={{op_name="splash"}}, backend_config={config}',
    )


@pytest.mark.parametrize(
    ("name", "products"),
    [("splash_mha_fwd_no_residuals", 2), ("splash_mha_dq", 3), ("splash_mha_dkv", 4)],
)
def test_attention_kernels_count_as_full_attention(name, products):
    found = hlo.work(kernel(name))
    assert found.flops == products * 2 * 4 * product(512, 64, 512)
    assert found.fused_attention == (f"tpu_custom_call {name}.1",)


def test_kernels_are_believed_about_their_cost():
    found = hlo.work(
        kernel("local", '{"custom_call_config":{"body":"x","cost_estimate":{"flops":"1234"}}}')
    )
    assert found.flops == 1234


def test_other_custom_calls_are_named():
    text = entry(
        "%a = f32[8]{0} parameter(0)",
        'ROOT %b = f32[8]{0} custom-call(%a), custom_call_target="TopK"',
    )
    assert hlo.work(text).uncounted == {"TopK": 1} and hlo.work(text).flops == 0


@pytest.mark.parametrize(("target", "products"), [("Softmax", 2), ("SoftmaxBackward", 5)])
def test_cudnn_attention(target, products):
    array = "bf16[2,256,4,64]{3,2,1,0}"
    text = entry(
        f"%q = {array} parameter(0)",
        f"%k = {array.replace('256', '96')} parameter(1)",
        f"ROOT %o = (bf16[2,4,256,64]{{3,1,2,0}}, u8[0]{{0}}) custom-call(%q, %k, %k), "
        f'custom_call_target="__cudnn$fmha{target}", backend_config={{}}',
    )
    found = hlo.work(text)
    assert found.flops == products * 2 * 4 * product(256, 64, 96)
    assert found.fused_attention == (f"__cudnn$fmha{target} o",)


def test_gpu_libraries():
    text = entry(
        "%a = bf16[3,16,40]{2,1,0} parameter(0)",
        "%b = bf16[3,40,24]{2,1,0} parameter(1)",
        "%c = (bf16[3,16,24]{2,1,0}, s8[4096]{0}) custom-call(%a, %b), "
        'custom_call_target="__cublas$gemm", backend_config={"gemm_backend_config":'
        '{"dot_dimension_numbers":{"lhs_contracting_dimensions":["2"],'
        '"rhs_contracting_dimensions":["1"],"lhs_batch_dimensions":["0"]}}}',
        "%x = f32[2,16,100]{2,1,0} parameter(2)",
        "%w = f32[32,16,7]{2,1,0} parameter(3)",
        "ROOT %y = (f32[2,32,94]{2,1,0}, u8[0]{0}) custom-call(%x, %w), window={size=7}, "
        'dim_labels=bf0_oi0->bf0, custom_call_target="__cudnn$convForward"',
    )
    assert hlo.work(text).flops == 3 * product(16, 40, 24) + 2 * 2 * 16 * 32 * 7 * 94


def test_asynchronous_collectives_are_counted_once():
    text = entry(
        "%a = f32[8]{0} parameter(0)",
        "%start = (f32[8]{0}, f32[32]{0}) all-gather-start(%a), dimensions={0}",
        "ROOT %done = f32[32]{0} all-gather-done(%start)",
    )
    found = hlo.work(text)
    assert found.collective_runs == {"all-gather": 1}
    assert found.collective_bytes == {"all-gather": 128}


def test_a_collective_that_runs_beside_fusions_is_counted_once():
    def fusion(name: str, result: str) -> str:
        return (
            f"%{name} (a: f32[8]) -> f32[32] {{\n"
            "  %a = f32[8]{0} parameter(0)\n"
            "  %g = f32[32]{0} all-gather(%a), dimensions={0}, "
            'backend_config={"async_collective_fusion_config":{"flag_start":"-1"}}\n'
            f"  ROOT %s = {result} custom-call(%g), "
            f'custom_call_target="AsyncCollective{name}"\n}}\n\n'
        )

    text = entry(
        "%a = f32[8]{0} parameter(0)",
        "%b = (f32[8]{0}, f32[32]{0}) fusion(%a), kind=kCustom, calls=%Start",
        "ROOT %c = f32[32]{0} fusion(%a), kind=kCustom, calls=%Done",
    )
    fusions = fusion("Start", "(f32[8]{0}, f32[32]{0})") + fusion("Done", "f32[32]{0}")
    found = hlo.work(text.replace("ENTRY", fusions + "ENTRY"))
    assert found.collective_runs == {"all-gather": 1} and found.uncounted == {}


@pytest.mark.parametrize("platform", ["gpu", "tpu"])
def test_products_between_the_ends_of_a_collective(platform):
    """Two gathers have a product beside them, which counts once; another has none."""
    start, done = {
        "gpu": (
            "%{0}-start = (f32[8]{{0}}, f32[32]{{0}}) all-gather-start(%a), dimensions={{0}}",
            "%{0}-done = f32[32]{{0}} all-gather-done(%{0}-start)",
        ),
        "tpu": (
            "%async-collective-start.{0} = f32[8]{{0}} fusion(%a), kind=kCustom, calls=%gather",
            "%async-collective-done.{0} = f32[32]{{0}} fusion(%a), kind=kCustom, calls=%nothing",
        ),
    }[platform]
    gather = (
        "%gather (a: f32[8]) -> f32[8] {\n  ROOT %a = f32[8]{0} parameter(0)\n}\n\n"
        "%nothing (a: f32[8]) -> f32[8] {\n  ROOT %a = f32[8]{0} parameter(0)\n}\n\n"
    )
    text = entry(
        "%a = f32[8]{0} parameter(0)",
        "%m = f32[4,4]{1,0} parameter(1)",
        start.format(1),
        start.format(3),
        "%p = f32[4,4]{1,0} dot(%m, %m), lhs_contracting_dims={1}, rhs_contracting_dims={0}",
        done.format(1),
        done.format(3),
        start.format(2),
        done.format(2),
        "ROOT %q = f32[4,4]{1,0} dot(%p, %m), lhs_contracting_dims={1}, rhs_contracting_dims={0}",
    )
    found = hlo.work(text.replace("ENTRY", gather + "ENTRY"))
    assert (found.async_collective_runs, found.overlapping_collective_runs) == (3, 2)
    assert found.overlapping_flops == 2 * 4**3 == found.flops / 2


def test_what_is_not_a_module_is_refused():
    with pytest.raises(ValueError, match="no ENTRY"):
        hlo.parse("module @jit_f {\n}\n")


def test_bytes_of_types():
    assert Array("bf16", (3, 5)).bytes == 30
    assert Array("pred", (3,)).bytes == 3
    assert Array("s4", (3,)).bytes == 2
    assert not Array("token", ()).is_float and Array("f8e4m3fn", ()).is_float
