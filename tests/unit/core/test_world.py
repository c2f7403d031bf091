from __future__ import annotations

import json
import os
import socket
import sys
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from forked import run_ranks
from zeroshard.core import world
from zeroshard.core.world import Rendezvous, device, hosts, init_distributed, local_rank, rendezvous
from zeroshard.errors import DistributedError, UsageError

TORCHRUN = {
    "RANK": "5",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "4",
    "MASTER_ADDR": "node0",
    "MASTER_PORT": "1234",
}
SLURM = {
    "SLURM_PROCID": "9",
    "SLURM_STEP_ID": "0",
    "SLURM_NTASKS": "11",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "2",
    "SLURM_TASKS_PER_NODE": "4(x2),3",
    "SLURM_NODELIST": "gpu[007-008,12]",
    "SLURM_LAUNCH_NODE_IPADDR": "10.0.0.99",
}
OPENMPI = {
    "OMPI_COMM_WORLD_RANK": "3",
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
}
ALONE = Rendezvous(0, 1, 0, 1, "127.0.0.1", 77, "alone")


def without(env: dict[str, str], *names: str) -> dict[str, str]:
    return {name: value for name, value in env.items() if name not in names}


@pytest.fixture
def clean_env(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in list(os.environ):
        if name.startswith(("SLURM_", "OMPI_", "PMIX_", "MASTER_", "TORCHELASTIC_", "ZEROSHARD_")):
            monkeypatch.delenv(name)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


@pytest.fixture
def joined(clean_env: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """What init_distributed hands to torch, which does nothing with it."""
    seen: dict[str, Any] = {}
    clean_env.setattr(
        dist, "init_process_group", lambda backend, **kw: seen.update(kw, backend=backend)
    )
    before = dict(os.environ)
    yield seen
    os.environ.clear()
    os.environ.update(before)


def test_no_launcher_is_a_world_of_one() -> None:
    assert rendezvous({}, 77) == ALONE


def test_torchrun_is_read_as_it_is() -> None:
    assert rendezvous(TORCHRUN, 77) == Rendezvous(5, 8, 1, 4, "node0", 1234, "torchrun")


def test_the_port_of_the_call_stands_in_for_a_missing_one() -> None:
    assert rendezvous(without(TORCHRUN, "MASTER_PORT"), 77).master_port == 77


def test_a_world_of_one_needs_no_address_and_no_local_rank() -> None:
    found = rendezvous({"RANK": "0", "WORLD_SIZE": "1"}, 77)
    assert found == Rendezvous(0, 1, 0, None, "127.0.0.1", 77, "torchrun")


@pytest.mark.parametrize(
    ("env", "named"),
    [
        (without(TORCHRUN, "WORLD_SIZE"), "WORLD_SIZE"),
        (without(TORCHRUN, "RANK"), "RANK"),
        (without(TORCHRUN, "LOCAL_RANK"), "LOCAL_RANK"),
        (without(TORCHRUN, "MASTER_ADDR"), "MASTER_ADDR"),
        ({**TORCHRUN, "RANK": "8"}, "RANK is 8"),
        ({**TORCHRUN, "RANK": "-1"}, "RANK is -1"),
        ({**TORCHRUN, "RANK": "one"}, "RANK is 'one'"),
        ({**TORCHRUN, "RANK": ""}, "RANK is ''"),
        ({**TORCHRUN, "WORLD_SIZE": "8.0"}, "WORLD_SIZE is '8.0'"),
        ({**TORCHRUN, "LOCAL_RANK": "4"}, "LOCAL_RANK is 4"),
        ({**TORCHRUN, "MASTER_PORT": "70000"}, "MASTER_PORT is 70000"),
        (without(SLURM, "SLURM_LOCALID"), "SLURM_LOCALID"),
        (without(SLURM, "SLURM_NTASKS"), "SLURM_NTASKS"),
        (without(SLURM, "SLURM_NODELIST", "SLURM_LAUNCH_NODE_IPADDR"), "SLURM_NODELIST"),
        ({**SLURM, "SLURM_NODELIST": "gpu[1-"}, "SLURM_NODELIST is 'gpu\\[1-'"),
        ({**SLURM, "SLURM_PROCID": "11"}, "SLURM_PROCID is 11"),
        ({**SLURM, "WORLD_SIZE": "2"}, "WORLD_SIZE is 2, but srun started 11"),
        (without(OPENMPI, "OMPI_COMM_WORLD_SIZE"), "OMPI_COMM_WORLD_SIZE"),
        (without(OPENMPI, "OMPI_COMM_WORLD_LOCAL_RANK"), "OMPI_COMM_WORLD_LOCAL_RANK"),
        (OPENMPI, "MASTER_ADDR"),
    ],
)
def test_half_an_environment_is_refused_by_the_name_of_the_variable(
    env: dict[str, str], named: str
) -> None:
    with pytest.raises(DistributedError, match=named):
        rendezvous(env, 77)


def test_slurm_tasks_meet_on_the_first_host_of_the_node_list() -> None:
    assert rendezvous(SLURM, 77) == Rendezvous(9, 11, 1, 3, "gpu007", 77, "slurm")


def test_slurm_needs_only_four_variables_and_a_step() -> None:
    env = {
        name: SLURM[name]
        for name in ("SLURM_PROCID", "SLURM_STEP_ID", "SLURM_NTASKS", "SLURM_LOCALID")
    }
    found = rendezvous({**env, "SLURM_JOB_NODELIST": "a,b"}, 77)
    assert found == Rendezvous(9, 11, 1, None, "a", 77, "slurm")


def test_slurm_names_the_host_of_srun_where_it_lists_no_nodes() -> None:
    assert rendezvous(without(SLURM, "SLURM_NODELIST"), 77).master_addr == "10.0.0.99"


def test_the_step_of_slurm_counts_and_not_its_allocation() -> None:
    env = {
        **SLURM,
        "SLURM_PROCID": "1",
        "SLURM_STEP_NUM_TASKS": "2",
        "SLURM_STEP_TASKS_PER_NODE": "1(x2)",
        "SLURM_STEP_NODELIST": "gpu[008,12]",
        "SLURM_NODEID": "1",
        "SLURM_LOCALID": "0",
        "MASTER_PORT": "4000",
    }
    assert rendezvous(env, 77) == Rendezvous(1, 2, 0, 1, "gpu008", 4000, "slurm")


@pytest.mark.parametrize(
    "env",
    [
        without(SLURM, "SLURM_PROCID"),  # salloc's shell
        without(SLURM, "SLURM_STEP_ID"),  # sbatch's script
        {**SLURM, "SLURM_PROCID": "0", "SLURM_STEP_ID": "4294967290"},  # salloc's interactive step
    ],
)
def test_a_shell_inside_an_allocation_is_a_world_of_one(env: dict[str, str]) -> None:
    assert rendezvous(env, 77) == ALONE


def test_open_mpi_on_one_host_meets_on_that_host() -> None:
    env = {**OPENMPI, "OMPI_COMM_WORLD_LOCAL_RANK": "3", "OMPI_COMM_WORLD_LOCAL_SIZE": "4"}
    assert rendezvous(env, 77) == Rendezvous(3, 4, 3, 4, "127.0.0.1", 77, "openmpi")


@pytest.mark.parametrize(
    ("name", "value", "host"),
    [
        ("MASTER_ADDR", "node9", "node9"),
        ("OMPI_MCA_orte_hnp_uri", "17.0;tcp://10.0.0.1,10.1.0.1:4321", "10.0.0.1"),
        ("OMPI_MCA_orte_hnp_uri", "17.0;tcp://172.20.1.2:33;tcp://172.40.1.2:33", "172.20.1.2"),
        ("OMPI_MCA_orte_hnp_uri", "17.0;tcp6://[fe80::1]:4321", "fe80::1"),
        ("PMIX_NAMESPACE", "prterun-node-01-4711@1", "node-01"),
    ],
)
def test_open_mpi_on_several_hosts_meets_where_it_says(name: str, value: str, host: str) -> None:
    found = rendezvous({**OPENMPI, name: value}, 77)
    assert found == Rendezvous(3, 4, 1, 2, host, 77, "openmpi")


def test_the_innermost_launcher_is_asked_first() -> None:
    assert rendezvous({**SLURM, **OPENMPI, **TORCHRUN}, 77).source == "torchrun"
    assert rendezvous({**SLURM, **OPENMPI, "MASTER_ADDR": "a"}, 77).source == "openmpi"


@pytest.mark.parametrize(
    ("nodelist", "expanded"),
    [
        ("node[003-005,7],x1", ["node003", "node004", "node005", "node7", "x1"]),
        ("rack[1-2]n[08-09]-ib", ["rack1n08-ib", "rack1n09-ib", "rack2n08-ib", "rack2n09-ib"]),
        ("login", ["login"]),
        ("a[9-11]", ["a9", "a10", "a11"]),
    ],
)
def test_node_lists_expand(nodelist: str, expanded: list[str]) -> None:
    assert list(hosts(nodelist)) == expanded


@pytest.mark.parametrize("nodelist", ["a[1", "a]", "a[]", "a[b]", "a[1-]", "a[[1]]", "a[1,,2]"])
def test_malformed_node_lists_are_refused(nodelist: str) -> None:
    with pytest.raises(DistributedError):
        list(hosts(nodelist))


names = st.from_regex(r"[a-z][a-z0-9]{0,4}(-[a-z]{1,3})?", fullmatch=True)
ranges = st.tuples(st.integers(0, 200), st.integers(0, 5), st.integers(1, 4))


@st.composite
def patterns(draw: st.DrawFn) -> tuple[str, list[str]]:
    """A pattern of one bracket, and the hosts it stands for."""
    prefix, suffix = draw(names), draw(st.sampled_from(["", "-ib", ".local"]))
    written: list[str] = []
    expanded: list[str] = []
    for first, more, width in draw(st.lists(ranges, min_size=1, max_size=4)):
        low, high = f"{first:0{width}d}", f"{first + more:0{width}d}"
        written.append(f"{low}-{high}" if more else low)
        expanded += [
            f"{prefix}{number:0{width}d}{suffix}" for number in range(first, first + more + 1)
        ]
    return f"{prefix}[{','.join(written)}]{suffix}", expanded


@given(st.lists(st.one_of(patterns(), names.map(lambda name: (name, [name]))), min_size=1))
def test_a_node_list_expands_to_the_hosts_it_was_written_from(
    parts: list[tuple[str, list[str]]],
) -> None:
    nodelist = ",".join(written for written, _ in parts)
    assert list(hosts(nodelist)) == [host for _, expanded in parts for host in expanded]


@given(st.text(alphabet="a1[]-, ", max_size=12))
def test_any_text_is_a_node_list_or_an_error(nodelist: str) -> None:
    try:
        found = list(hosts(nodelist))
    except DistributedError:
        return
    assert all("[" not in host and "]" not in host and "," not in host for host in found)


def test_one_process_joins_itself_without_a_port(joined: dict[str, Any]) -> None:
    init_distributed(verbose=False)
    assert isinstance(joined["store"], dist.HashStore)
    assert (joined["rank"], joined["world_size"], joined["init_method"]) == (0, 1, None)
    assert joined["timeout"] == timedelta(minutes=10)
    assert "RANK" not in os.environ


def test_slurm_is_exported_in_the_words_of_torchrun(joined: dict[str, Any]) -> None:
    os.environ.update(SLURM)
    init_distributed(distributed_port=77)
    assert (joined["rank"], joined["world_size"]) == (9, 11)
    assert joined["init_method"] == "tcp://gpu007:77"
    exported = {name: os.environ[name] for name in TORCHRUN}
    assert exported == {
        "RANK": "9",
        "WORLD_SIZE": "11",
        "LOCAL_RANK": "1",
        "LOCAL_WORLD_SIZE": "3",
        "MASTER_ADDR": "gpu007",
        "MASTER_PORT": "77",
    }
    assert local_rank() == 1


def test_slurm_is_not_read_without_discovery(joined: dict[str, Any]) -> None:
    os.environ.update(SLURM)
    init_distributed(auto_mpi_discovery=False)
    assert joined["world_size"] == 1


def test_the_arguments_of_the_call_come_before_the_environment(joined: dict[str, Any]) -> None:
    os.environ.update(TORCHRUN, ZEROSHARD_TIMEOUT="3")
    init_distributed(
        "mpi", timeout=timedelta(seconds=5), init_method="tcp://h:1", rank=1, world_size=2
    )
    assert joined["backend"] == "mpi"
    assert joined["timeout"] == timedelta(seconds=5)
    assert (joined["rank"], joined["world_size"], joined["init_method"]) == (1, 2, "tcp://h:1")


def test_another_meeting_point_needs_no_master(joined: dict[str, Any]) -> None:
    os.environ.update(without(TORCHRUN, "MASTER_ADDR", "MASTER_PORT"))
    init_distributed(init_method="file://meet")
    assert (joined["init_method"], joined["rank"]) == ("file://meet", 5)


def test_an_address_of_ipv6_is_bracketed(joined: dict[str, Any]) -> None:
    os.environ.update(TORCHRUN, MASTER_ADDR="fe80::1")
    init_distributed()
    assert joined["init_method"] == "tcp://[fe80::1]:1234"


def test_minutes_of_patience_come_from_the_environment(joined: dict[str, Any]) -> None:
    os.environ["ZEROSHARD_TIMEOUT"] = "0.5"
    init_distributed()
    assert joined["timeout"] == timedelta(seconds=30)


@pytest.mark.parametrize("minutes", ["soon", "0", "-1", "nan", "inf"])
def test_patience_must_be_a_number_of_minutes(joined: dict[str, Any], minutes: str) -> None:
    os.environ["ZEROSHARD_TIMEOUT"] = minutes
    with pytest.raises(DistributedError, match="ZEROSHARD_TIMEOUT"):
        init_distributed()
    assert joined == {}


@pytest.mark.parametrize(("rank", "size"), [(2, 2), (0, -1), (-1, 2)])
def test_rank_and_world_size_go_together(joined: dict[str, Any], rank: int, size: int) -> None:
    with pytest.raises(UsageError, match="do not name one rank"):
        init_distributed(rank=rank, world_size=size)
    assert joined == {}


def test_a_promised_process_group_must_exist(joined: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="no process group"):
        init_distributed(dist_init_required=False)
    assert joined == {}


def test_a_rank_that_cannot_join_says_where_it_tried(joined: dict[str, Any]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        os.environ.update(TORCHRUN, RANK="0", MASTER_ADDR="127.0.0.1")
        os.environ["MASTER_PORT"] = str(taken.getsockname()[1])

        def join(_backend: str, *, init_method: str, **_: object) -> None:
            next(dist.rendezvous(init_method, 0, 8, timeout=timedelta(seconds=1)))

        dist.init_process_group = join
        with pytest.raises(DistributedError, match=r"rank 0 of 8 .* tcp://127.0.0.1:") as raised:
            init_distributed()
    assert "MASTER_PORT is free" in str(raised.value)


def show_gpus(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: count - 1)


@pytest.mark.parametrize(
    ("gpus", "env", "expected"),
    [
        (0, TORCHRUN, "cpu"),
        (4, TORCHRUN, "cuda:1"),
        (1, TORCHRUN, "cuda:0"),  # a launcher that shows each rank its own GPU only
        (4, SLURM, "cuda:1"),
        (4, OPENMPI, "cuda:1"),
        (4, {}, "cuda:3"),  # what torch.cuda.set_device chose
    ],
)
def test_a_rank_uses_the_gpu_of_its_local_rank(
    clean_env: pytest.MonkeyPatch, gpus: int, env: dict[str, str], expected: str
) -> None:
    show_gpus(clean_env, gpus)
    for name, value in env.items():
        clean_env.setenv(name, value)
    assert str(device()) == expected


def test_more_ranks_than_gpus_are_refused(clean_env: pytest.MonkeyPatch) -> None:
    show_gpus(clean_env, 2)
    clean_env.setenv("LOCAL_RANK", "2")
    with pytest.raises(DistributedError, match="local rank is 2, but 2 GPUs"):
        device()


def test_a_gpu_is_chosen_and_bound_before_nccl_starts(joined: dict[str, Any]) -> None:
    with pytest.MonkeyPatch.context() as monkeypatch:
        show_gpus(monkeypatch, 4)
        chosen: list[torch.device] = []
        monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
        os.environ.update(TORCHRUN)
        init_distributed()
        assert chosen == [torch.device("cuda:1")]
        assert (joined["backend"], joined["device_id"]) == ("nccl", torch.device("cuda:1"))
        init_distributed("gloo")
        assert (joined["backend"], joined["device_id"]) == ("gloo", None)


def test_an_uncaught_error_is_left_where_the_launcher_looks(
    joined: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    printed: list[str] = []
    monkeypatch.setattr(sys, "excepthook", lambda _kind, error, _trace: printed.append(str(error)))
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    init_distributed()
    for text in ("first", "second"):
        try:
            raise ValueError(text)
        except ValueError as error:
            sys.excepthook(ValueError, error, error.__traceback__)
    sys.excepthook(KeyboardInterrupt, KeyboardInterrupt("third"), None)
    assert printed == ["first", "second", "third"]
    (file,) = tmp_path.iterdir()
    message = json.loads(file.read_text())["message"]
    assert message["message"] == "ValueError: first"
    assert message["extraInfo"]["py_callstack"].endswith("ValueError: first\n")
    assert int(message["extraInfo"]["timestamp"]) <= message["extraInfo"]["time_s"]
    assert joined["world_size"] == 1


def test_ranks_of_slurm_meet_for_real(clean_env: pytest.MonkeyPatch) -> None:
    del clean_env  # children inherit what is left
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]

    def meet(rank: int, size: int) -> tuple[float, str]:
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
            del os.environ[name]
        os.environ.update(
            SLURM_PROCID=str(rank),
            SLURM_STEP_ID="3",
            SLURM_NTASKS=str(size),
            SLURM_LOCALID=str(rank),
            SLURM_NODELIST="localhost",
        )
        init_distributed(distributed_port=port)
        total = torch.tensor(float(rank + 1))
        dist.all_reduce(total)
        init_distributed()  # keeps the group
        return total.item(), dist.get_backend()

    assert run_ranks(meet, 2, process_group=False) == [(3.0, "gloo")] * 2


def test_one_process_is_a_real_group(clean_env: pytest.MonkeyPatch) -> None:
    del clean_env

    def meet(_rank: int, _size: int) -> int:
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
            del os.environ[name]
        init_distributed()
        dist.all_reduce(torch.ones(2))
        dist.barrier()
        return dist.get_world_size()

    assert run_ranks(meet, 1, process_group=False) == [1]


def test_a_process_group_that_exists_is_kept_and_checked(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def keep(_rank: int, size: int) -> list[str]:
        group = dist.group.WORLD
        init_distributed("gloo", rank=0, world_size=size)
        init_distributed(dist_init_required=False)
        assert dist.group.WORLD is group
        caplog.clear()
        init_distributed("nccl")
        with pytest.raises(DistributedError, match=r"world_size=7.*already with world_size=1"):
            init_distributed(world_size=7)
        return caplog.messages

    ((warning,),) = run_ranks(keep, 1)
    assert "dist_backend='nccl' is ignored" in warning


def test_every_public_name_is_listed() -> None:
    assert world.__all__ == sorted(world.__all__)
