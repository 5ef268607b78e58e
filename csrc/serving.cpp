#include "serving.h"

#include <algorithm>
#include <chrono>
#include <stdexcept>
#include <string>
#include <vector>

#include "follow.h"

namespace vmo {

namespace {

using Clock = std::chrono::steady_clock;

constexpr int32_t kFollowsUses = 2;  // vmo_observer.follows

int64_t ns_since(Clock::time_point began) {
  return std::chrono::duration_cast<std::chrono::nanoseconds>(Clock::now() - began).count();
}

template <typename Id>
void observe(Observer& observer, const Id* ids, const LayerCall& call, int32_t num_experts) {
  ++observer.layers_seen;
  if (observer.ids == nullptr && observer.follows == 0) return;
  const int64_t num_ids = call.num_tokens * call.top_k;
  if (num_ids != observer.ids_per_layer) {
    throw std::invalid_argument("layer " + std::to_string(call.layer) + " routed " +
                                std::to_string(num_ids) + " ids, the step has " +
                                std::to_string(observer.ids_per_layer));
  }
  const int64_t begin = static_cast<int64_t>(call.layer) * num_experts;
  float* votes = observer.votes + begin;
  histogram(ids, call.num_tokens, call.top_k, call.weights, num_experts, votes);
  if (observer.ids != nullptr) {
    std::transform(ids, ids + num_ids, observer.ids + call.layer * num_ids,
                   [](Id id) { return static_cast<int32_t>(id); });
  }
  if (observer.follows == 0) return;
  if (observer.follows == kFollowsUses) {
    std::transform(votes, votes + num_experts, votes,
                   [](float vote) { return vote > 0.0F ? 1.0F : 0.0F; });
  }
  follow(observer.scores + begin, votes,
         observer.fade != nullptr ? observer.fade + begin : nullptr, observer.gains[call.layer],
         observer.decay, num_experts);
}

// Writes the slot of every planned id. VMO_NO_EXPERT gets that of its token's first expert, and
// where a token has none, like ids from num_ids on, which are padding, that of the first expert
// of all; slot 0 if there is none.
template <typename Id>
void remap(const Planner& planner, int32_t layer, const Id* ids, int64_t num_ids,
           int64_t num_padded_ids, int32_t top_k, Id* slots) {
  const int32_t num_experts = planner.config().num_experts;
  const auto slot_of = [&](Id id) {
    const bool valid = id >= 0 && id < num_experts;
    const int32_t slot = valid ? planner.slot_of(layer, static_cast<int32_t>(id)) : -1;
    if (slot < 0) {
      throw std::logic_error("expert " + std::to_string(id) + " of layer " +
                             std::to_string(layer) + " has no slot");
    }
    return static_cast<Id>(slot);
  };
  const auto is_expert = [](Id id) { return id != VMO_NO_EXPERT; };
  const Id* needed = std::find_if(ids, ids + num_ids, is_expert);
  const Id any_slot = needed != ids + num_ids ? slot_of(*needed) : Id{0};
  for (int64_t begin = 0; begin < num_ids; begin += top_k) {
    const Id* end = ids + begin + top_k;
    const Id* first = std::find_if(ids + begin, end, is_expert);
    const Id stand_in = first != end ? slot_of(*first) : any_slot;
    for (int64_t i = begin; i < begin + top_k; ++i)
      slots[i] = is_expert(ids[i]) ? slot_of(ids[i]) : stand_in;
  }
  std::fill(slots + num_ids, slots + num_padded_ids, any_slot);
}

template <typename Id>
bool serve(Planner& planner, RouterLookahead* lookahead, const LayerCall& call,
           LayerOutcome& outcome) {
  const auto* ids = static_cast<const Id*>(call.ids);
  const int64_t num_ids = call.num_tokens * call.top_k;
  const Clock::time_point began = Clock::now();
  if (call.observer != nullptr) {
    observe(*call.observer, ids, call, planner.config().num_experts);
  }
  if (lookahead != nullptr && lookahead->watches(call.layer)) {
    lookahead->observe(call.layer, ids);
  }
  outcome.policy_ns = ns_since(began);

  if (!planner.plan(call.layer, ids, num_ids, call.flags)) return false;
  const Plan& plan = planner.current();
  outcome.num_experts = static_cast<int32_t>(plan.experts.size());
  outcome.num_hits = plan.num_hits;
  outcome.num_misses = static_cast<int32_t>(plan.miss_experts.size());
  if (call.slots != nullptr) {
    remap(planner, call.layer, ids, num_ids, call.num_padded_tokens * call.top_k, call.top_k,
          static_cast<Id*>(call.slots));
  }
  if (outcome.num_misses > 0 || lookahead == nullptr || call.hidden == nullptr) return true;

  const Clock::time_point planned = Clock::now();
  outcome.num_reads = lookahead->foresee(planner, call);
  outcome.policy_ns += ns_since(planned);
  return true;
}

}  // namespace

template <typename Id>
void histogram(const Id* ids, int64_t num_tokens, int32_t top_k, const float* weights,
               int32_t num_experts, float* out) {
  std::fill_n(out, num_experts, 0.0F);
  for (int64_t token = 0; token < num_tokens; ++token) {
    const float weight = weights != nullptr ? weights[token] : 1.0F;
    for (int32_t j = 0; j < top_k; ++j) {
      const Id id = ids[token * top_k + j];
      if (id == VMO_NO_EXPERT) continue;
      if (id < 0 || id >= num_experts) {
        throw std::invalid_argument("expert id " + std::to_string(id) + " of token " +
                                    std::to_string(token) + " is outside [0, " +
                                    std::to_string(num_experts) + ")");
      }
      out[id] += weight;
    }
  }
}

template void histogram(const int32_t*, int64_t, int32_t, const float*, int32_t, float*);
template void histogram(const int64_t*, int64_t, int32_t, const float*, int32_t, float*);

bool serve_layer(Planner& planner, RouterLookahead* lookahead, const LayerCall& call,
                 LayerOutcome& outcome) {
  outcome = LayerOutcome{};
  return call.id_bytes == 8 ? serve<int64_t>(planner, lookahead, call, outcome)
                            : serve<int32_t>(planner, lookahead, call, outcome);
}

}  // namespace vmo
