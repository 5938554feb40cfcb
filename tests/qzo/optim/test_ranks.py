"""Steps that several processes take together: the bits of one process, errors that name a rank, and few bytes."""

import pytest
import rank_runs
import torch
import torch.distributed as dist
from rank_runs import MICRO_BATCHES, closures, model, optimizer, run, trained

import qzo
from qzo.errors import QzoError
from qzo.optim.ranks import fingerprint

WAYS = {
    "batch": ("batch", {}),
    "batch, momentum, philox": ("batch", {"momentum": 0.9, "noise": "philox", "directions": 2}),
    "directions": ("directions", {"directions": 3, "estimator": "one-sided"}),
    "directions, one": ("directions", {}),
    "mezo": ("batch", {"name": "mezo"}),
}


def every_way(rank):
    return {name: trained(qzo.Ranks(share), **options) for name, (share, options) in WAYS.items()}


@pytest.fixture(scope="module")
def alone():
    return {name: trained(None, **options) for name, (_, options) in WAYS.items()}


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_any_number_of_ranks_comes_to_the_bits_of_one_process(size, alone):
    for found in run(size, every_way):
        for name, (truth, losses, sent) in found.items():
            expected, their_losses, _ = alone[name]
            assert losses == their_losses, name
            assert all(torch.equal(truth[key], expected[key]) for key in expected), name
            assert 0 < sent < 1024, name


def test_the_runs_above_move_something_and_differ(alone):
    start = optimizer(model()).truth()
    assert not any(torch.equal(alone["batch"][0][key], start[key]) for key in start)
    assert alone["batch"][1] != alone["directions"][1]


def raising(rank):
    """A closure of rank 1 raises in step 2; rank 0 then goes on with what it had."""
    net = model()
    trainer = optimizer(net, ranks=qzo.Ranks())
    mine = closures(net, torch.ones(16, 32).bfloat16())
    trainer.step(mine)
    before = {key: value.clone() for key, value in trainer.truth().items()}
    live = net[0].scales.clone()

    def fails():
        raise ValueError("no such row")

    told = None
    try:
        trainer.step([fails if place == 1 else closure for place, closure in enumerate(mine)])
    except (QzoError, ValueError) as error:
        told = type(error).__name__, str(error)
    same = all(torch.equal(before[key], value) for key, value in trainer.truth().items())
    put_back = torch.equal(live, net[0].scales)
    trainer.step(mine)
    return told, same and put_back and trainer.steps == 2, fingerprint(trainer.truth().values())


def test_a_closure_that_raises_leaves_the_step_out_on_every_rank():
    (told, same, bits), (own, their_same, their_bits) = run(2, raising)
    assert same and their_same and bits == their_bits
    assert own == ("ValueError", "no such row")
    assert told[0] == "QzoError" and told[1].startswith("the closure of rank 1 raised")


def unlike(rank):
    """Seeds differ; then masters, in the third step, of ranks that compare them each step."""
    found = []
    for seed, moved in ((rank, False), (0, True)):
        net = model()
        trainer = optimizer(net, seed=seed, ranks=qzo.Ranks(check_every=1))
        try:
            for step in range(3):
                if moved and step == 2 and rank == 1:
                    trainer.truth()["0.master"][0, 0] += 1e-6
                trainer.step(closures(net, torch.ones(16, 32).bfloat16()))
        except QzoError as error:
            found.append((trainer.steps, str(error)))
    return found


def test_a_rank_that_differs_is_named_before_it_spoils_a_step():
    for (steps, seed), (later, bits) in run(2, unlike):
        assert steps == 0 and seed.startswith("rank 1 differs in its seed (1, on rank 0 0)")
        assert later == 2 and bits.startswith("rank 1 differs in its tensors' bits")


def left(rank):
    """Rank 1 ends before the step."""
    ranks = qzo.Ranks()
    if rank == 0:
        return trained(ranks)
    return "gone"


def test_a_rank_that_is_gone_is_told_in_one_line():
    told, _ = run(2, left)
    assert told.startswith("the other ranks cannot be reached (") and "\n" not in told
    assert "torchrun --max-restarts" in told


def test_a_fingerprint_tells_bits_order_and_dtypes_apart():
    plain = torch.tensor([1.0, 2.0, 3.0])
    same = fingerprint([plain])
    assert fingerprint([plain.clone()]) == same
    for other in ([plain.flip(0)], [plain[:2], plain[2:]], [plain, plain], [plain.bfloat16()], [-plain]):
        assert fingerprint(other) != same
    assert 0 <= same < 2**64


def test_without_a_process_group_the_remedy_is_told():
    assert not dist.is_initialized()
    with pytest.raises(QzoError, match="torchrun"):
        qzo.Ranks()


def test_options_that_cannot_be_are_refused(monkeypatch):
    with pytest.raises(QzoError, match='choose "batch" or "directions"'):
        qzo.Ranks("data")
    with pytest.raises(QzoError, match="check_every=0"):
        qzo.Ranks(check_every=0)
    net = model()
    with pytest.raises(QzoError, match="give exact=True"):
        qzo.MeZO({"w": net[0].scales}, ranks=object(), exact=False)


def test_micro_batches_are_as_many_as_told():
    assert len(closures(model(), torch.ones(16, 32))) == MICRO_BATCHES == rank_runs.MICRO_BATCHES
