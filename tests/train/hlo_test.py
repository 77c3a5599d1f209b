import pytest

from mtl_jax.train.hlo import Collective, collectives

pytestmark = pytest.mark.fast

TEXT = """\
HloModule jit_step, is_scheduled=true

%inner (p: f32[8]) -> f32[8] {
  %p = f32[8]{0} parameter(0)
  ROOT %all-reduce.1 = f32[8]{0} all-reduce(%p), replica_groups={{0,1},{2,3}}, to_apply=%add
}

%body (arg: (s32[], f32[8])) -> (s32[], f32[8]) {
  %call = f32[8]{0} fusion(%x), kind=kLoop, calls=%inner
  %all-gather.7 = bf16[1,256,128]{2,1,0:T(8,128)(2,1)S(1)} all-gather(%q), channel_id=4, replica_groups=[2,2]<=[4]T(1,0), dimensions={1}, use_global_device_ids=true
  %all-gather.8 = bf16[1,256,128]{2,1,0} all-gather(%q), channel_id=4, replica_groups=[2,2]<=[4]T(1,0), dimensions={1}
}

ENTRY %main (a: f32[8]) -> f32[] {
  %while.1 = (s32[], f32[8]) while(%t), condition=%cond, body=%body
  %all-reduce.2 = (f32[]{:T(128)}, f32[16,2]{1,0}) all-reduce(%a, %b), channel_id=9, replica_groups=mesh['axis_0'=2] {'axis_0'}, to_apply=%add
  %all-reduce.3 = f32[] all-reduce(%a), channel_id=10, replica_groups=mesh['axis_0'=2] {'axis_0'}, to_apply=%add
  %collective-permute-start = (f32[4]{0:S(1)}, f32[4]{0}, u32[]{:S(2)}, u32[]{:S(2)}) collective-permute-start(%f), channel_id=12, source_target_pairs={{0,1},{1,0}}, frontend_attributes={a="b"}
  %collective-permute-done = f32[4]{0} collective-permute-done(%collective-permute-start)
  %get = f32[4]{0} get-tuple-element(%all-reduce.2), index=0
}
"""  # noqa: E501


def test_collectives_by_kind_shape_and_place():
    mesh = "mesh['axis_0'=2] {'axis_0'}"
    assert collectives(TEXT) == (
        Collective("all-gather", "bf16", (1, 256, 128), "[2,2]<=[4]T(1,0)", True, 1),
        Collective("all-reduce", "f32", (16, 2), mesh, False, 1),
        Collective("all-reduce", "f32", (8,), "{{0,1},{2,3}}", True, 1),
        Collective("collective-permute", "f32", (4,), "{{0,1},{1,0}}", False, 1),
        Collective("all-reduce", "f32", (), mesh, False, 2),
    )


@pytest.mark.parametrize(
    ("dtype", "nbytes"), [("bf16", 12), ("f32", 24), ("pred", 6), ("f8e4m3fn", 6)]
)
def test_bytes(dtype, nbytes):
    assert Collective("all-reduce", dtype, (2, 3), "", False, 1).nbytes == nbytes


def test_text_without_collectives():
    assert collectives("ENTRY %main () -> f32[] {\n  %c = f32[] constant(0)\n}") == ()


SCATTERED = """\
%all-reduce-scatter.8.clone (input: bf16[64,8], other: bf16[8,32]) -> (bf16[16,8], bf16[8,8]) {
  %all-reduce.3 = (bf16[64,8]{1,0}, bf16[8,32]{1,0}) all-reduce(%input, %other), channel_id=1, replica_groups={{0,1,2,3}}, to_apply=%add
}

ENTRY %main (a: bf16[64,8]) -> bf16[16,8] {
  %fusion = (bf16[16,8]{1,0}, bf16[8,8]{1,0}) fusion(%a, %b), kind=kCustom, calls=%all-reduce-scatter.8.clone
}
"""  # noqa: E501


def test_a_sum_that_is_cut_at_once_is_a_reduce_scatter():
    groups = "{{0,1,2,3}}"
    assert collectives(SCATTERED) == (
        Collective("reduce-scatter", "bf16", (16, 8), groups, False, 1),
        Collective("reduce-scatter", "bf16", (8, 8), groups, False, 1),
    )
