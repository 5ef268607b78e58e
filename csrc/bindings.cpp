// Torch operators of the serving hot path: the core's C ABI on tensors. Registration only;
// what the operators do is written, tested and documented in the torch-free core.
#include <Python.h>
#include <torch/library.h>

#include "c_api.h"

namespace {

vmo_planner* planner_of(int64_t handle) {
  return reinterpret_cast<vmo_planner*>(static_cast<intptr_t>(handle));
}

void check_ids(const at::Tensor& ids) {
  TORCH_CHECK(
      ids.dim() == 2 && ids.is_contiguous() && ids.device().is_cpu() &&
          (ids.scalar_type() == at::kInt || ids.scalar_type() == at::kLong),
      "topk_ids must be a contiguous CPU tensor [tokens, top_k] of int32 or int64, got ",
      ids.scalar_type(), " ", ids.sizes(), " on ", ids.device());
}

// Plans `layer` for the first `num_tokens` rows of topk_ids and writes every id's pool row
// to slot_ids (padding rows get a row needed anyway). info: int32 [3], see c_api.h.
// Returns whether the need fits; if not, nothing changed.
bool plan(int64_t handle, int64_t layer, const at::Tensor& topk_ids, int64_t num_tokens,
          int64_t flags, at::Tensor& slot_ids, at::Tensor& info) {
  check_ids(topk_ids);
  TORCH_CHECK(slot_ids.is_contiguous() && slot_ids.sizes() == topk_ids.sizes() &&
                  slot_ids.scalar_type() == topk_ids.scalar_type(),
              "slot_ids must be like topk_ids, got ", slot_ids.scalar_type(), " ",
              slot_ids.sizes());
  TORCH_CHECK(info.scalar_type() == at::kInt && info.numel() == 3 && info.is_contiguous(),
              "info must be int32 [3]");
  TORCH_CHECK(num_tokens >= 0 && num_tokens <= topk_ids.size(0), "num_tokens ", num_tokens,
              " is outside [0, ", topk_ids.size(0), "]");
  const auto id_bytes = static_cast<int32_t>(topk_ids.element_size());
  const int64_t num_ids = num_tokens * topk_ids.size(1);
  const auto layer_index = static_cast<int32_t>(layer);
  const int32_t planned =
      vmo_planner_plan(planner_of(handle), layer_index, topk_ids.const_data_ptr(), num_ids,
                       id_bytes, static_cast<uint32_t>(flags), info.data_ptr<int32_t>());
  TORCH_CHECK(planned >= 0, vmo_last_error());
  if (planned == 0) return false;
  if (num_ids > 0) {
    TORCH_CHECK(
        vmo_planner_remap(planner_of(handle), layer_index, topk_ids.const_data_ptr(), num_ids,
                          topk_ids.numel(), id_bytes, slot_ids.data_ptr()) == 0,
        vmo_last_error());
  }
  return true;
}

// out[e] = sum of weights (float32 [tokens]) of the rows that chose expert e.
void expert_votes(const at::Tensor& topk_ids, const at::Tensor& weights, at::Tensor& out) {
  check_ids(topk_ids);
  TORCH_CHECK(weights.scalar_type() == at::kFloat && weights.is_contiguous() &&
                  weights.numel() <= topk_ids.size(0),
              "weights must be contiguous float32 of at most ", topk_ids.size(0), " rows");
  TORCH_CHECK(out.scalar_type() == at::kFloat && out.is_contiguous(),
              "out must be contiguous float32");
  TORCH_CHECK(
      vmo_expert_histogram(
          topk_ids.const_data_ptr(), weights.numel(), static_cast<int32_t>(topk_ids.size(1)),
          static_cast<int32_t>(topk_ids.element_size()), weights.const_data_ptr<float>(),
          static_cast<int32_t>(out.numel()), out.data_ptr<float>()) == 0,
      vmo_last_error());
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(vllm_moe_offload, library) {
  library.def(
      "plan(int planner, int layer, Tensor topk_ids, int num_tokens, int flags, "
      "Tensor(a!) slot_ids, Tensor(b!) info) -> bool");
  library.def("expert_votes(Tensor topk_ids, Tensor weights, Tensor(a!) out) -> ()");
}

TORCH_LIBRARY_IMPL(vllm_moe_offload, CPU, library) {
  library.impl("plan", &plan);
  library.impl("expert_votes", &expert_votes);
}

// `import vllm_moe_offload._C` loads the library, which registers the operators.
PyMODINIT_FUNC PyInit__C() {
  static PyModuleDef module = {
      PyModuleDef_HEAD_INIT, "_C", nullptr, 0, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&module);
}
