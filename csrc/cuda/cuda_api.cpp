#include "cuda_api.h"

#include <cstddef>
#include <memory>
#include <string>

#include "../guarded.h"
#include "copier.h"

struct vmo_copier {
  explicit vmo_copier(const vmo::CopierConfig& config) : core(config) {}
  vmo::Copier core;
};

namespace {

using vmo::guarded;
using vmo::last_error;

cudaStream_t stream_of(uint64_t handle) { return reinterpret_cast<cudaStream_t>(handle); }

static_assert(sizeof(vmo_slot_pair) == sizeof(vmo::SlotPair) &&
                  offsetof(vmo_slot_pair, device_slot) == offsetof(vmo::SlotPair, device_slot),
              "the same pair");

}  // namespace

extern "C" {

int32_t vmo_cuda_api_version(void) { return VMO_CUDA_API_VERSION; }

const char* vmo_cuda_last_error(void) { return last_error.c_str(); }

vmo_copier* vmo_copier_create(int32_t device, void* records, uint64_t record_bytes,
                              int32_t num_host_slots, int32_t num_device_slots,
                              const vmo_tensor_slots* tensors, int32_t num_tensors) {
  return guarded<vmo_copier*>(nullptr, [&] {
    vmo::CopierConfig config;
    config.device = device;
    config.records = static_cast<char*>(records);
    config.record_bytes = record_bytes;
    config.num_host_slots = num_host_slots;
    config.num_device_slots = num_device_slots;
    for (int32_t i = 0; i < num_tensors; ++i) {
      config.tensors.push_back({tensors[i].record_offset, tensors[i].slot_bytes,
                                static_cast<char*>(tensors[i].slots)});
    }
    return std::make_unique<vmo_copier>(config).release();
  });
}

void vmo_copier_destroy(vmo_copier* copier) { const std::unique_ptr<vmo_copier> owner(copier); }

int32_t vmo_copier_set_engine(vmo_copier* copier, int32_t engine) {
  return guarded<int32_t>(-1, [&] {
    copier->core.set_engine(static_cast<vmo::CopyEngine>(engine));
    return 0;
  });
}

int32_t vmo_copier_copy(vmo_copier* copier, int32_t lane, const vmo_slot_pair* pairs,
                        int32_t num_pairs) {
  return guarded<int32_t>(-1, [&] {
    return copier->core.copy(lane, reinterpret_cast<const vmo::SlotPair*>(pairs), num_pairs);
  });
}

int32_t vmo_copier_done(vmo_copier* copier, int32_t ticket) {
  return guarded<int32_t>(-1, [&] { return copier->core.done(ticket) ? 1 : 0; });
}

int32_t vmo_copier_wait(vmo_copier* copier, int32_t ticket) {
  return guarded<int32_t>(-1, [&] {
    copier->core.wait(ticket);
    return 0;
  });
}

int32_t vmo_copier_join(vmo_copier* copier, int32_t ticket, uint64_t compute_stream) {
  return guarded<int32_t>(-1, [&] {
    copier->core.join(ticket, stream_of(compute_stream));
    return 0;
  });
}

int32_t vmo_copier_release(vmo_copier* copier, int32_t ticket) {
  return guarded<int32_t>(-1, [&] {
    copier->core.release(ticket);
    return 0;
  });
}

int32_t vmo_copier_after_compute(vmo_copier* copier, uint64_t compute_stream) {
  return guarded<int32_t>(-1, [&] {
    copier->core.after_compute(stream_of(compute_stream));
    return 0;
  });
}

}  // extern "C"
