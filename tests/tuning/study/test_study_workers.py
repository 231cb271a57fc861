"""Workers, on one machine and on several, that share a study; some of them are killed."""

import json
import os
import signal
import time

import pytest
from study_samples import EPOCHS, FORK, made_up, plan, searched

optuna = pytest.importorskip("optuna", reason="needs optuna: pip install 'crosslevel[tune]'")

from crosslevel.tuning.plan import url
from crosslevel.tuning.storage import locked_everywhere
from crosslevel.tuning.study import Search
from crosslevel.tuning.trials import outcome, spent


def shared(told, out, barrier):
    barrier.wait()

    def train(number, parameters):
        with open(out, "a") as file:
            file.write(json.dumps([number, os.getpid()]) + "\n")
        for told in made_up(number, parameters):
            time.sleep(0.05)
            yield told

    searched(told, train)


@pytest.mark.parametrize("database", ["sqlite", "postgresql", "postgresql from two machines"])
def test_two_workers_at_once_make_one_study_and_do_no_trial_twice(tmp_path, database, request):
    out, machines = tmp_path / "trained", [tmp_path / "here"] * 2
    address = request.getfixturevalue("postgresql") if database != "sqlite" else None
    if "two machines" in database:
        machines[1] = tmp_path / "there"  # no lock of the one is seen by the other
    name = "t" if "two machines" in database else "s"
    for machine in machines:
        machine.mkdir(exist_ok=True)
    plans = [plan(machine / name, budget=5.0, storage=url(address, machine / name)) for machine in machines]
    told, barrier = plans[0], FORK.Barrier(2)
    workers = [FORK.Process(target=shared, args=(own, out, barrier)) for own in plans]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(300)
    assert [worker.exitcode for worker in workers] == [0, 0]
    done = [json.loads(line) for line in out.read_text().splitlines()]
    numbers = [number for number, _ in done]
    assert len({pid for _, pid in done}) == 2
    study = optuna.load_study(study_name=name, storage=told.storage)
    repeated = [t.number for t in study.trials if outcome(t) == "repeated"]
    assert sorted(numbers) == list(range(len(study.trials)))
    assert len({json.dumps(study.trials[number].params) for number in numbers}) == len(numbers)
    assert not repeated
    assert spent(study.trials, EPOCHS) <= 5
    assert not any(t.state == optuna.trial.TrialState.RUNNING for t in study.trials)


def held(told, begun, has_it):
    begun.set()
    with locked_everywhere(told):
        has_it.set()
        time.sleep(600)


@pytest.mark.parametrize("fate", [signal.SIGKILL, signal.SIGSTOP])
def test_machines_that_share_a_database_wait_for_each_other_but_not_for_one_that_is_gone(tmp_path, postgresql, fate):
    """Dead, or cut off from the network: silent, with its connection still open."""

    def on(machine, name):
        (tmp_path / machine).mkdir(exist_ok=True)
        silent = 60 if fate == signal.SIGKILL else 15
        return plan(tmp_path / machine / name, storage=url(postgresql, tmp_path), silent=silent)

    begun, has_it, waits, passed = (FORK.Event() for _ in range(4))
    holder = FORK.Process(target=held, args=(on("here", "lock"), begun, has_it), daemon=True)
    waiter = FORK.Process(target=held, args=(on("there", "lock"), waits, passed), daemon=True)
    try:
        holder.start()
        assert has_it.wait(120)
        waiter.start()
        assert waits.wait(120)
        with locked_everywhere(on("there", "another study")):
            assert not passed.wait(1)
        os.kill(holder.pid, fate)
        assert passed.wait(120)
    finally:
        for process in (holder, waiter):
            process.kill()


def stuck(told, flag):
    def train(number, parameters):
        for epoch, found in enumerate(made_up(number, parameters), 1):
            if number == 2 and epoch == 1:
                flag.touch()
                time.sleep(600)
            yield found

    searched(told, train)


@pytest.mark.parametrize("seen", ["lock", "silence"])
def test_a_killed_workers_trial_is_marked_and_tried_again(tmp_path, seen):
    """By its lock on the same machine; by its silence where only the database is shared."""
    folder, flag = tmp_path / "s", tmp_path / "flag"
    told = plan(folder, budget=4.0, grace=0.3 if seen == "silence" else 1e6)
    worker = FORK.Process(target=stuck, args=(told, flag))
    worker.start()
    while not flag.exists():
        assert worker.is_alive()
        time.sleep(0.01)
    os.kill(worker.pid, signal.SIGKILL)
    worker.join()
    if seen == "silence":
        for file in (folder / "workers").iterdir():
            file.unlink()
    trials = searched(told)
    assert (outcome(trials[2]), trials[2].user_attrs["reason"]) == ("killed", "its worker died")
    again = [t for t in trials if t.params == trials[2].params and t.number != 2]
    assert [outcome(t) for t in again] in (["complete"], ["pruned"])
    assert again[0].user_attrs["again"] == 2
    assert 3 < spent(trials, EPOCHS) <= 4
    assert not list((folder / "workers").iterdir())


def resting(told, flag):
    search = Search(told)
    search.life_sign(search.worker).with_suffix(".yaml").touch()
    flag.touch()
    time.sleep(600)


def test_what_a_worker_leaves_that_is_killed_between_trials_is_removed(tmp_path):
    told = plan(tmp_path / "s", trials=1)
    workers = [FORK.Process(target=resting, args=(told, tmp_path / f"flag{i}")) for i in range(2)]
    for i, worker in enumerate(workers):
        worker.start()
        while not (tmp_path / f"flag{i}").exists():
            assert worker.is_alive()
            time.sleep(0.01)
    workers[0].kill()
    workers[0].join()
    searched(told)
    assert len(list((tmp_path / "s" / "workers").iterdir())) == 2  # of the one that lives
    workers[1].kill()
    workers[1].join()
    searched(told)
    assert not list((tmp_path / "s" / "workers").iterdir())


def test_a_worker_that_lives_keeps_its_trial(tmp_path):
    """Neither its lock nor its signs of life let another one take it."""
    folder, flag = tmp_path / "s", tmp_path / "flag"
    for grace, hidden in ((0.0, False), (0.5, True)):
        flag.unlink(missing_ok=True)
        told = plan(folder, grace=grace, budget=100.0)
        worker = FORK.Process(target=stuck, args=(plan(folder, budget=100.0, beat=0.05), flag))
        worker.start()
        try:
            while not flag.exists() and worker.is_alive():
                time.sleep(0.01)
            search = Search(told)
            if hidden:
                for file in (folder / "workers").iterdir():
                    file.unlink()
            for _ in range(4):
                search.reclaim()
                time.sleep(0.2)
            assert outcome(search.study.trials[2]) == "running"
            search.close()
        finally:
            worker.kill()
            worker.join()
        folder = tmp_path / "t"


def test_workers_agree_on_the_settings(tmp_path):
    searched(plan(tmp_path / "s", budget=1.0))
    with pytest.raises(ValueError, match="its study began with other settings: batch_size=64, not 32: give another"):
        Search(plan(tmp_path / "s", agreed={"batch_size": 32}))
