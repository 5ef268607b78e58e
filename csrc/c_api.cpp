#include "c_api.h"

#include <algorithm>
#include <array>
#include <atomic>
#include <chrono>
#include <memory>
#include <string>

#include "file_reader.h"
#include "follow.h"
#include "guarded.h"
#include "lookahead.h"
#include "planner.h"
#include "serving.h"

struct vmo_planner {
  vmo::Planner core;
};

struct vmo_lookahead {
  vmo::RouterLookahead core;
};

struct vmo_reader {
  vmo_reader(const std::vector<std::string>& paths, bool direct, int32_t num_threads,
             const std::vector<int32_t>& cpus)
      : core(paths, direct, num_threads, cpus) {}
  vmo::FileReader core;
};

namespace {

using vmo::guarded;
using vmo::last_error;

void check_id_bytes(int32_t id_bytes) {
  if (id_bytes != 4 && id_bytes != 8) {
    throw std::invalid_argument("ids must be int32 or int64, got " + std::to_string(id_bytes) +
                                " bytes each");
  }
}

}  // namespace

extern "C" {

int32_t vmo_abi_version(void) { return VMO_ABI_VERSION; }

const char* vmo_last_error(void) { return last_error.c_str(); }

vmo_planner* vmo_planner_create(int32_t num_layers, int32_t num_experts, int32_t num_slots,
                                int32_t num_staging_slots, int32_t order, int32_t scope,
                                int32_t admission, vmo_planner_view* view) {
  return guarded<vmo_planner*>(nullptr, [&] {
    vmo::PlannerConfig config;
    config.num_layers = num_layers;
    config.num_experts = num_experts;
    config.num_slots = num_slots;
    config.num_staging_slots = num_staging_slots;
    config.order = static_cast<vmo::Order>(order);
    config.scope = static_cast<vmo::Scope>(scope);
    config.admission = admission != 0;
    auto planner = std::make_unique<vmo_planner>(vmo_planner{vmo::Planner(config)});
    *view = planner->core.view();
    return planner.release();
  });
}

void vmo_planner_destroy(vmo_planner* planner) {
  const std::unique_ptr<vmo_planner> owner(planner);
}

int32_t vmo_serve_layer(vmo_planner* planner, const vmo_layer_call* call,
                        vmo_layer_outcome* outcome) {
  return guarded<int32_t>(-1, [&] {
    check_id_bytes(call->id_bytes);
    vmo::RouterLookahead* lookahead =
        call->lookahead != nullptr ? &call->lookahead->core : nullptr;
    return vmo::serve_layer(planner->core, lookahead, *call, *outcome) ? 1 : 0;
  });
}

int32_t vmo_planner_finish(vmo_planner* planner) {
  return guarded<int32_t>(-1, [&] {
    planner->core.finish();
    return 0;
  });
}

int32_t vmo_planner_complete(vmo_planner* planner, int32_t slot, int32_t ok) {
  return guarded<int32_t>(-1, [&] {
    planner->core.complete(slot, ok != 0);
    return 0;
  });
}

int32_t vmo_planner_prefetch(vmo_planner* planner, int32_t layer, int32_t expert, float value) {
  return guarded<int32_t>(-2, [&] { return planner->core.prefetch(layer, expert, value); });
}

int32_t vmo_planner_cancel_prefetch(vmo_planner* planner, int32_t slot) {
  return guarded<int32_t>(-1, [&] {
    planner->core.cancel_prefetch(slot);
    return 0;
  });
}

int32_t vmo_planner_is_resident(const vmo_planner* planner, int32_t layer, int32_t expert) {
  return planner->core.is_resident(layer, expert) ? 1 : 0;
}

int32_t vmo_expert_histogram(const void* ids, int64_t num_tokens, int32_t top_k,
                             int32_t id_bytes, const float* weights, int32_t num_experts,
                             float* out) {
  return guarded<int32_t>(-1, [&] {
    check_id_bytes(id_bytes);
    if (id_bytes == 4) {
      vmo::histogram(static_cast<const int32_t*>(ids), num_tokens, top_k, weights, num_experts,
                     out);
    } else {
      vmo::histogram(static_cast<const int64_t*>(ids), num_tokens, top_k, weights, num_experts,
                     out);
    }
    return 0;
  });
}

vmo_lookahead* vmo_lookahead_create(int32_t num_layers, int32_t num_experts,
                                    int32_t num_own_experts, int32_t hidden_size, int32_t top_k,
                                    int32_t depth, int32_t max_tokens, float memory,
                                    const void* weight, int32_t weight_type, const float* bias,
                                    float* tried, float* right, float* trust) {
  return guarded<vmo_lookahead*>(nullptr, [&] {
    vmo::LookaheadConfig config;
    config.num_layers = num_layers;
    config.num_experts = num_experts;
    config.num_own_experts = num_own_experts;
    config.hidden_size = hidden_size;
    config.top_k = top_k;
    config.depth = depth;
    config.max_tokens = max_tokens;
    config.memory = memory;
    const vmo::RouterWeights routers{weight, static_cast<vmo::FloatType>(weight_type), bias};
    const vmo::RouterLookahead core(config, routers, {tried, right, trust});
    return std::make_unique<vmo_lookahead>(vmo_lookahead{core}).release();
  });
}

void vmo_lookahead_destroy(vmo_lookahead* lookahead) {
  const std::unique_ptr<vmo_lookahead> owner(lookahead);
}

int32_t vmo_lookahead_begin_step(vmo_lookahead* lookahead, int64_t num_tokens) {
  return guarded<int32_t>(-1, [&] { return lookahead->core.begin_step(num_tokens); });
}

int32_t vmo_lookahead_observe(vmo_lookahead* lookahead, int32_t layer, const int64_t* ids) {
  return guarded<int32_t>(-1, [&] {
    lookahead->core.observe(layer, ids);
    return 0;
  });
}

int32_t vmo_lookahead_foresee(vmo_lookahead* lookahead, vmo_planner* planner,
                              const vmo_layer_call* call) {
  return guarded<int32_t>(-1, [&] { return lookahead->core.foresee(planner->core, *call); });
}

void vmo_follow(float* scores, const float* votes, const float* fade, float gain, float decay,
                int64_t count) {
  vmo::follow(scores, votes, fade, gain, decay, count);
}

int32_t vmo_follow_values(const vmo_value_step* step) {
  return guarded<int32_t>(-1, [&] {
    vmo::follow_values(*step);
    return 0;
  });
}

vmo_reader* vmo_reader_open(const char* const* paths, int32_t num_paths, int32_t direct,
                            int32_t num_threads, const int32_t* cpus, int32_t num_cpus) {
  return guarded<vmo_reader*>(nullptr, [&] {
    const std::vector<std::string> files(paths, paths + num_paths);
    const std::vector<int32_t> affinity(cpus, cpus + num_cpus);
    return std::make_unique<vmo_reader>(files, direct != 0, num_threads, affinity).release();
  });
}

void vmo_reader_close(vmo_reader* reader) {
  std::unique_ptr<vmo_reader> owner(reader);
  if (owner != nullptr && owner->core.close_if_forked()) static_cast<void>(owner.release());
}

const int32_t* vmo_reader_num_ended(const vmo_reader* reader) {
  static_assert(sizeof(std::atomic<int32_t>) == sizeof(int32_t));
  return reinterpret_cast<const int32_t*>(&reader->core.num_ended());
}

int64_t vmo_reader_file_bytes(const vmo_reader* reader) {
  return static_cast<int64_t>(reader->core.file_bytes());
}

int32_t vmo_reader_submit(vmo_reader* reader, const vmo_read* reads, int32_t num_reads) {
  return guarded<int32_t>(-1, [&] {
    std::vector<vmo::ReadRequest> requests(static_cast<size_t>(num_reads));
    for (int32_t i = 0; i < num_reads; ++i) {
      const vmo_read& read = reads[i];
      vmo::ReadRequest& request = requests[static_cast<size_t>(i)];
      request.tag = read.tag;
      request.offset = read.offset;
      request.priority = static_cast<vmo::Priority>(read.priority);
      request.extents.reserve(static_cast<size_t>(read.num_extents));
      for (int32_t j = 0; j < read.num_extents; ++j) {
        request.extents.push_back({read.extents[j].destination, read.extents[j].length});
      }
    }
    reader->core.submit(std::move(requests));
    return 0;
  });
}

int32_t vmo_reader_promote(vmo_reader* reader, int64_t tag) {
  return guarded<int32_t>(-1, [&] { return reader->core.promote(tag) ? 1 : 0; });
}

int32_t vmo_reader_drop(vmo_reader* reader, int64_t tag) {
  return guarded<int32_t>(-1, [&] { return reader->core.drop(tag) ? 1 : 0; });
}

int32_t vmo_reader_wait(vmo_reader* reader, vmo_completion* completions, int32_t capacity,
                        int32_t min_count, int32_t timeout_ms) {
  return guarded<int32_t>(-1, [&] {
    std::array<vmo::ReadResult, 64> results;
    const size_t limit = std::min(results.size(), static_cast<size_t>(std::max(capacity, 0)));
    const size_t count =
        reader->core.wait(results.data(), limit, static_cast<size_t>(std::max(min_count, 1)),
                          std::chrono::milliseconds(timeout_ms));
    for (size_t i = 0; i < count; ++i) {
      completions[i] = {results[i].tag, results[i].error, 0, results[i].bytes};
    }
    return static_cast<int32_t>(count);
  });
}

}  // extern "C"
