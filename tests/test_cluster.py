"""Workers on a real Ray cluster of two nodes on this machine, which are killed while they are at work."""

import socket
from pathlib import Path

import pytest
from test_workers import make

from qpruner.errors import PlanError, WorkersError
from qpruner.workers import workers

ray = pytest.importorskip("ray", reason="needs the extra ray")


def test_what_is_no_address_or_answers_nothing_is_refused():
    with pytest.raises(WorkersError, match="Accepted: auto, or HOST:PORT"), workers(make, 3, ray="ray://head:1"):
        pass
    with socket.socket() as free:
        free.bind(("", 0))
        address = f"{ray.util.get_node_ip_address()}:{free.getsockname()[1]}"
        if address.startswith("127."):
            pytest.skip("Ray itself looks for loopback addresses, for half a minute")
        with pytest.raises(WorkersError, match=f"nothing answers at {address}.*ray start --head"):
            with workers(make, 3, ray=address):
                pass


@pytest.fixture
def two_nodes(monkeypatch):
    """A head node without cores, which holds the records, and two nodes with a core each."""
    from ray.cluster_utils import Cluster

    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    little = dict(object_store_memory=80_000_000, include_dashboard=False)
    cluster = Cluster(initialize_head=True, head_node_args=dict(num_cpus=0, **little))
    try:
        yield cluster, [cluster.add_node(num_cpus=1, wait=False, **little) for _ in range(2)]
    finally:
        cluster.shutdown()


def test_lost_nodes_cost_no_result(two_nodes, tmp_path, capfd):
    cluster, nodes = two_nodes
    cluster.wait_for_nodes()
    here = make(3)
    items = [1, "stumble once", 2, "wait 0.5", 3, "wait 0.5", 4, "wait 0.5", 5]
    expected = [here(item) if isinstance(item, int) else here(1) for item in items]
    events, seen = [], []

    def kill_one(index, result):
        seen.append(index)
        if len(seen) == 4:
            cluster.remove_node(nodes.pop(), allow_graceful=False)

    with workers(make, 3, tmp_path, ray=cluster.address, on_event=events.append, wait_s=60) as pool:
        with pytest.raises(PlanError, match="another model"):
            pool.map(["refuse"])
        assert pool.map(items, on_result=kill_one) == expected
        assert sorted(seen) == list(range(len(items)))
        assert any("at item" in event for event in events) and not any("going on" in event for event in events), events

        pool._crew._place._wait_s = 2  # from here on no node comes
        seen.clear()
        assert pool.map(items, on_result=kill_one) == expected
        assert sorted(seen) == list(range(len(items)))
        assert any("waiting up to 2 s" in event for event in events), events
        assert "going on with one process on this machine" in events[-1]
    assert not ray.is_initialized()
    assert capfd.readouterr().out == ""  # what a command prints is its result
