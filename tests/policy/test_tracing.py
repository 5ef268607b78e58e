"""The policy that `--moe-offload=trace` serves with: LRFU's scores, every request traced."""

import numpy as np

from vllm_moe_offload.policy import StepRows, make_policy
from vllm_moe_offload.policy.tracing import TracingLRFU

LAYERS, EXPERTS, TOP_K = 3, 8, 2
RNG = np.random.default_rng(0)


def rows_of(*requests):
    """Requests as (name, tokens, first position, prompt length)."""
    names, lengths, firsts, prompts = zip(*requests, strict=True)
    firsts = np.array(firsts)
    return StepRows.of_lengths(names, np.array(lengths), firsts, firsts < np.array(prompts))


def run(policies, rows):
    """One step with random routing through all policies; ids ``[layers, rows, top_k]``."""
    count = rows.request_of_row.size
    ids = np.stack(
        [
            [RNG.choice(EXPERTS, TOP_K, replace=False) for _ in range(count)]
            for _ in range(LAYERS)
        ]
    ).astype(np.int32)
    for policy in policies:
        policy.begin_step(rows)
        for layer in range(LAYERS):
            votes = np.zeros(EXPERTS, np.float32)
            np.add.at(votes, ids[layer], rows.weights[:, None])
            policy.observe(layer, ids[layer], votes)
        policy.end_step()
    return ids


def counts(ids):
    """Counts ``[layers, experts]`` by hand."""
    table = np.zeros((LAYERS, EXPERTS))
    for layer in range(LAYERS):
        for expert in ids[layer].ravel():
            table[layer, expert] += 1
    return table


def test_scores_are_lrfus():
    traced, plain = TracingLRFU(LAYERS, EXPERTS), make_policy("lrfu", LAYERS, EXPERTS)
    for step in range(5):
        run([traced, plain], rows_of(("a", 1, 4 + step, 4), ("b", 3, 3 * step, 100)))
    np.testing.assert_array_equal(traced.scores, plain.scores)


def test_requests_in_one_batch_are_told_apart():
    policy = TracingLRFU(LAYERS, EXPERTS)
    first = run([policy], rows_of(("a", 5, 0, 5), ("b", 3, 0, 7)))  # b prefills in chunks
    second = run([policy], rows_of(("b", 4, 3, 7), ("a", 1, 5, 5)))  # and the order changes
    a, b = policy.tracer.get("a"), policy.tracer.get("b")
    np.testing.assert_array_equal(a.prefill, counts(first[:, :5]))
    np.testing.assert_array_equal(a.decode, counts(second[:, 4:]))
    np.testing.assert_array_equal(b.prefill, counts(first[:, 5:]) + counts(second[:, :4]))
    assert not b.decode.any()
    assert (a.num_prefill, a.num_decode, b.num_prefill) == (5, 1, 7)


def test_recompute_after_preemption_is_not_counted_again():
    policy = TracingLRFU(LAYERS, EXPERTS)
    run([policy], rows_of(("a", 6, 0, 6)))
    run([policy], rows_of(("a", 1, 6, 6)))
    before = policy.tracer.get("a").counts.sum()
    again = run([policy], rows_of(("a", 8, 0, 6)))  # preempted: all computed again, one new
    activation = policy.tracer.get("a")
    assert activation.counts.sum() == before + LAYERS * TOP_K
    np.testing.assert_array_equal(
        activation.counts.sum(axis=1), np.full(LAYERS, 8 * TOP_K, np.float32)
    )
    assert again.shape[1] == 8


def test_prefix_cached_positions_are_absent_and_their_number_kept():
    policy = TracingLRFU(LAYERS, EXPERTS)
    run([policy], rows_of(("a", 2, 16, 18)))
    activation = policy.tracer.get("a")
    assert (activation.num_cached, activation.num_prefill) == (16, 2)
    assert activation.counts.sum() == LAYERS * 2 * TOP_K


def test_a_finished_request_leaves_and_a_broken_step_is_dropped():
    policy = TracingLRFU(LAYERS, EXPERTS)
    run([policy], rows_of(("a", 1, 0, 1), ("b", 1, 0, 1)))
    policy.end_request("a")
    assert policy.tracer.get("a") is None
    assert len(policy.tracer) == 1
    before = policy.tracer.get("b").counts.sum()
    policy.begin_step(rows_of(("b", 1, 1, 1)))
    policy.observe(0, np.zeros((1, TOP_K), np.int32), np.zeros(EXPERTS, np.float32))
    policy.end_step()  # a read failed after the first layer
    assert policy.tracer.get("b").counts.sum() == before
