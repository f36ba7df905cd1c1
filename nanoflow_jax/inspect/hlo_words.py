"""The words that the HLO reader knows: opcodes, attributes, custom calls."""

_COLLECTIVES = """all-gather all-reduce reduce-scatter all-to-all ragged-all-to-all collective-permute
collective-broadcast collective-reduce"""

# XLA's opcode table, xla/hlo/ir/hlo_opcode.h. "-start", "-update" and "-done" of any of them are read as async.
_OPCODES = """abs acos acosh add add-dependency after-all and asin asinh async atan atan2 atanh batch-norm-grad
batch-norm-inference batch-norm-training bitcast bitcast-convert broadcast call cbrt ceil cholesky clamp compare
complex concatenate conditional constant convert convolution copy cosh cosine count-leading-zeros custom-call
divide domain dot dynamic-reshape dynamic-slice dynamic-update-slice erf exponential exponential-minus-one fft
floor fusion gather get-dimension-size get-tuple-element imag infeed iota is-finite log log-plus-one logistic map
maximum minimum mulhi multiply negate not opt-barrier or outfeed pad parameter partition-id popcnt power ragged-dot
real recv reduce reduce-precision reduce-window remainder replica-id reshape reverse rng rng-bit-generator
rng-get-and-update-state round-nearest-afz round-nearest-even rsqrt scaled-dot scan scatter select
select-and-scatter send set-dimension-size shift-left shift-right-arithmetic shift-right-logical shuffle sign sine
sinh slice sort sqrt stochastic-convert subtract tan tanh topk transpose triangular-solve tuple while xor"""

# Attributes as HLO text prints them: xla/hlo/parser/hlo_parser.cc and what the compiles of the tests show.
_ATTRIBUTES = """algorithm api_version async_execution_thread backend_config batch_group_count branch_computations body
called_computations calls channel_id condition constrain_layout control-predecessors custom_call_has_side_effect
custom_call_target dim_labels dimensions direction distribution dynamic_slice_sizes exponent_bits false_computation
feature_group_count fft_length fft_type frontend_attributes index index_vector_dim indices_are_sorted
inserted_window_dims iota_dimension is_host_transfer is_stable k kind largest lhs_batch_dims lhs_contracting_dims
lower mantissa_bits metadata offset_dims collapsed_slice_dims operand_batching_dims operand_layout_constraints
operand_precision origin output_to_operand_aliasing padding padding_type parameter_replication replica_groups
result_accuracy rhs_batch_dims rhs_contracting_dims scatter scatter_dims_to_operand_dims input_batching_dims
scatter_indices_batching_dims schedule select sharding slice slice_sizes source_target_pairs split_dimension
start_index_map start_indices_batching_dims statistics to_apply true_computation type unique_indices
update_window_dims use_global_device_ids window left_side unit_diagonal transpose_a"""

COLLECTIVES = frozenset(_COLLECTIVES.split())
OPCODES = COLLECTIVES | frozenset(_OPCODES.split())
ATTRIBUTES = frozenset(_ATTRIBUTES.split())

CALLED = (
    "calls",
    "to_apply",
    "body",
    "condition",
    "true_computation",
    "false_computation",
    "branch_computations",
    "called_computations",
)
# Beginnings of the custom call targets whose cost is understood: GEMM libraries, Mosaic kernels, sort and top-k.
GEMM_LIBRARIES = ("__cublas$", "__triton_gemm")
MOSAIC = "mosaic_gpu"
KERNELS = (*GEMM_LIBRARIES, MOSAIC, "__gpu$TopK", "__cub$", "AllocateBuffer")
