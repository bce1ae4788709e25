"""Tables, schema and queries, on SQLite and PostgreSQL."""

from __future__ import annotations

import subprocess
import sys
from datetime import UTC, datetime, timedelta

import pytest
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from click.testing import Result
from sqlalchemy import event, select, text, update
from sqlalchemy.exc import IntegrityError, StatementError
from tables_kit import PLAN, TARGET, convs, failed, make_device, measured
from typer.testing import CliRunner

from lut_db.cli import app
from lut_db.errors import InvalidInput, NotFound, StaleSchema
from lut_db.estimates import Traits
from lut_db.measurements import Status
from lut_db.networks import Network
from lut_db.operators import Convolution
from lut_db.storage import Database, queries
from lut_db.storage import models as m


def prepare(database: Database, count: int = 0) -> list[str]:
    """A device, the plan, and `count` operators; returns their keys."""
    operators = convs(count)
    with database.write() as session:
        queries.put_device(session, make_device(), queries.clock(session))
        queries.put_plan(session, PLAN)
        queries.put_workloads(session, operators)
    return list(operators)


def write_rows(database: Database, keys: list[str], latency_ms: float = 1.0) -> None:
    with database.write() as session:
        now = queries.clock(session)
        new = [queries.NewRow(measured(key, latency_ms), "bench", None, None, now) for key in keys]
        assert queries.append_rows(session, TARGET.key, PLAN.key, new) == len(keys)


# --- schema ---------------------------------------------------------------------------------------------------


def test_the_migrations_make_the_tables_of_the_models(database: Database) -> None:
    with database.engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        assert compare_metadata(context, m.Base.metadata) == []


def test_an_upgrade_says_of_old_workloads_what_corrections_ask(empty_database_url: str) -> None:
    database = Database(empty_database_url)
    depthwise = Convolution(input=(1, 8, 4, 4), filters=8, kernel=(3, 3), padding=(1, 1, 1, 1), groups=8)
    network = Network.of(depthwise)
    try:
        database.upgrade("0004")
        with database.write() as session:
            now = queries.clock(session)
            queries.put_device(session, make_device(), now)
            queries.put_plan(session, PLAN)
            for key, kind, known in ((depthwise.key, depthwise.kind, depthwise), (network.key, m.NETWORK, network)):
                said = {"key": key, "kind": kind, "definition": known.model_dump_json()}
                session.execute(text("INSERT INTO workloads VALUES (:key, :kind, :definition)"), said)
            new = [queries.NewRow(measured(depthwise.key, 1.0), "bench", None, None, now)]
            queries.append_rows(session, TARGET.key, PLAN.key, new)
        database.upgrade()
        with database.read() as session:
            assert queries.known_traits(session, [depthwise.key]) == {depthwise.key: Traits.of(depthwise)}
            assert session.get_one(m.Workload, network.key).parameters == network.parameters == 80
            assert queries.newest_rows(session, TARGET.key, PLAN.key, [depthwise.key])[depthwise.key].latency_ms == 1.0
    finally:
        database.close()


def test_absent_stale_and_newer_schemas_are_refused(empty_database_url: str) -> None:
    database = Database(empty_database_url)
    try:
        with pytest.raises(StaleSchema, match="no tables yet") as refused:
            database.check()
        assert refused.value.remedy == f"run: lut-db upgrade --database {database}"
        database.upgrade()
        database.upgrade()  # nothing is left to do
        database.check()
        with database.write() as session:
            session.execute(text("UPDATE alembic_version SET version_num = '9999'"))
        with pytest.raises(StaleSchema, match="newer program"):
            database.check()
    finally:
        database.close()


def test_many_processes_upgrade_at_once(empty_database_url: str) -> None:
    command = [sys.executable, "-m", "lut_db.cli", "upgrade", "--database", empty_database_url]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) for _ in range(3)]
    for process in running:
        said, _ = process.communicate()
        assert process.returncode == 0, said.decode()
    database = Database(empty_database_url)
    database.check()
    database.close()


@pytest.mark.parametrize("url", ["nothing", "sqlite://", "sqlite:///:memory:", "mysql://host/name"])
def test_other_databases_are_refused(url: str) -> None:
    with pytest.raises(InvalidInput) as refused:
        Database(url)
    assert refused.value.field == "database"
    assert "sqlite:///FILE" in (refused.value.remedy or "")


def test_a_password_is_not_told() -> None:
    database = Database("postgresql://someone:secret@127.0.0.1/tables")
    assert "secret" not in str(database)


def test_naive_times_are_refused(database: Database) -> None:
    prepare(database)
    with pytest.raises(StatementError, match="no time zone"), database.write() as session:
        session.execute(update(m.Device).values(last_seen=datetime(2030, 1, 1)))


def test_times_come_back_with_their_zone(database: Database) -> None:
    prepare(database)
    moment = datetime(2030, 1, 1, 12, 0, 0, 123456, tzinfo=UTC)
    with database.write() as session:
        queries.see_device(session, "bench", moment)
    with database.read() as session:
        assert session.execute(select(m.Device.last_seen)).scalar_one() == moment
        assert queries.clock(session).utcoffset() == timedelta(0)


def test_foreign_keys_hold(database: Database) -> None:
    with pytest.raises(IntegrityError), database.write() as session:
        session.add(m.Pin(target="0" * 16, plan="0" * 16, opened_at=queries.clock(session)))


def test_a_transaction_that_raises_leaves_nothing(database: Database) -> None:
    def half_way() -> None:
        with database.write() as session:
            queries.put_plan(session, PLAN)
            queries.read_target(session, "0" * 16)

    with pytest.raises(NotFound):
        half_way()
    with pytest.raises(NotFound), database.read() as session:
        queries.read_plan(session, PLAN.key)


# --- rows and pins --------------------------------------------------------------------------------------------


def test_rows_are_revisions_and_the_newest_counts(database: Database) -> None:
    keys = prepare(database, 3)
    write_rows(database, keys, 1.0)
    write_rows(database, keys[:1], 2.0)
    with database.write() as session:
        now = queries.clock(session)
        queries.append_rows(
            session, TARGET.key, PLAN.key,
            [queries.NewRow(failed(keys[2], "unsupported", "no\x00kernel"), "bench", None, None, now)],
        )  # fmt: skip
    with database.read() as session:
        rows = queries.newest_rows(session, TARGET.key, PLAN.key, [*keys, "f" * 32])
        assert [rows[key].latency_ms for key in keys] == [2.0, 1.0, None]
        assert rows[keys[2]].status is Status.FAILED
        assert "unsupported" in (rows[keys[2]].message or "")
        page = queries.page_of_rows(session, TARGET.key)
        assert [row.revision for row, _ in page] == [1, 2, 2]
        (view,) = queries.read_targets(session)
        assert view.rows == 3


def test_a_pin_keeps_what_it_read(database: Database) -> None:
    keys = prepare(database, 4)
    write_rows(database, keys[:2], 1.0)
    with database.write() as session:
        pin = queries.open_pin(session, TARGET.key, PLAN.key, queries.clock(session))
        assert queries.freeze_rows(session, pin, keys) == 2
    write_rows(database, keys, 5.0)
    with database.write() as session:
        pin = queries.read_pin(session, pin.id, lock=True)
        assert queries.freeze_rows(session, pin, keys[:3]) == 1
        rows = queries.frozen_rows(session, pin.id, keys)
        assert {key: row.latency_ms for key, row in rows.items()} == {keys[0]: 1.0, keys[1]: 1.0, keys[2]: 5.0}
        assert queries.seal_pin(session, pin) == 1
        assert queries.seal_pin(session, pin) == 1


def test_the_queue_holds_each_once_and_nothing_that_has_a_row(database: Database) -> None:
    keys = prepare(database, 5)
    write_rows(database, keys[:1])
    with database.write() as session:
        now = queries.clock(session)
        assert queries.enqueue(session, TARGET.key, PLAN.key, keys, now) == 4
        assert queries.enqueue(session, TARGET.key, PLAN.key, keys, now) == 0
        assert queries.enqueue(session, TARGET.key, PLAN.key, keys, now, again=True) == 1
        assert queries.read_queue(session, TARGET.key, now) == queries.Queue(pending=5)
        oldest = queries.lock_oldest(session, queries.Claimant("bench", TARGET.key, now, now, now))
        assert oldest is not None
        assert oldest.workload == keys[1]


def test_who_stands_beside_whom_is_kept_once(database: Database) -> None:
    keys = prepare(database, 4)
    pairs = [(keys[0], keys[1]), (keys[1], keys[2]), (keys[3], keys[2])]
    added = [(keys[0], keys[2]), (keys[0], keys[1])]
    for some, others, means in (
        (pairs[:2], added, {keys[2]: 1e9, keys[0]: 2.5}), (pairs, added[:1], {keys[2]: 7.0}), ([], [], {})
    ):  # fmt: skip
        with database.write() as session:
            queries.put_beside(session, some, others, means)
    with database.read() as session:
        assert queries.read_beside(session, keys) == (sorted(pairs), sorted(added))
        assert queries.read_beside(session, [keys[3]]) == ([pairs[2]], [])
        assert queries.read_beside(session, []) == ([], [])
        assert sorted(queries.read_mean_parameters(session, keys)) == [2.5, 7.0], "of those that were told, the last"
        assert queries.read_mean_parameters(session, [keys[1]]) == []


def test_a_device_has_one_active_lease(database: Database) -> None:
    prepare(database)
    with database.write() as session:
        now = queries.clock(session)
        first = queries.open_lease(session, "bench", TARGET.key, PLAN.key, [], now, now)
    with pytest.raises(IntegrityError), database.write() as session:
        queries.open_lease(session, "bench", TARGET.key, PLAN.key, [], now, now)
    with database.write() as session:
        queries.lock_lease(session, first.id).state = "expired"
        session.flush()
        second = queries.open_lease(session, "bench", TARGET.key, PLAN.key, [], now, now)
    assert second.id > first.id


def test_tokens_are_never_used_again(database: Database) -> None:
    prepare(database)
    tokens = []
    for _ in range(3):
        with database.write() as session:
            now = queries.clock(session)
            tokens.append(queries.open_lease(session, "bench", TARGET.key, PLAN.key, [], now, now).id)
        with database.write() as session:
            session.execute(text("DELETE FROM leases"))
    assert tokens == sorted(set(tokens))


@pytest.mark.parametrize("size", [10, 200])
def test_sets_travel_as_one_parameter(database: Database, size: int) -> None:
    keys = prepare(database, size)
    write_rows(database, keys)
    statements: list[str] = []
    event.listen(database.engine, "before_cursor_execute", lambda *told: statements.append(told[2]))
    with database.read() as session:
        assert len(queries.newest_rows(session, TARGET.key, PLAN.key, keys)) == size
        assert len(queries.known_traits(session, keys)) == size
        assert queries.settled(session, TARGET.key, PLAN.key, keys) == size
    assert len([said for said in statements if not said.startswith("BEGIN")]) == 3


# --- files and the command ------------------------------------------------------------------------------------


def lut_db(*arguments: str) -> Result:
    return CliRunner().invoke(app, arguments)


def test_a_snapshot_goes_to_a_file_and_into_another_database(database: Database, tmp_path) -> None:
    keys = prepare(database, 3)
    with database.write() as session:
        evidence = queries.put_evidence(session, {"load": 0.1})
        now = queries.clock(session)
        new = [queries.NewRow(measured(key, 0.125), "bench", None, evidence, now) for key in keys[:2]]
        new.append(queries.NewRow(failed(keys[2], "unsupported"), "bench", None, evidence, now))
        queries.append_rows(session, TARGET.key, PLAN.key, new)
        queries.base_on_canary(session, TARGET.key, "canary_ms", 0.25)
        queries.base_on_canary(session, TARGET.key, "heavy_canary_ms", 1.5)
        pin = queries.open_pin(session, TARGET.key, PLAN.key, now)
        queries.freeze_rows(session, pin, keys)
        queries.seal_pin(session, pin)
    here, there = database.url.render_as_string(hide_password=False), f"sqlite:///{tmp_path / 'other.sqlite'}"
    file, again = tmp_path / "snapshot.json", tmp_path / "again.json"
    done = lut_db("snapshot", "export", "1", str(file), "--database", here)
    assert done.exit_code == 0, done.stderr
    assert lut_db("upgrade", "--database", there).exit_code == 0
    for number in (1, 2):
        done = lut_db("snapshot", "import", str(file), "--database", there)
        assert done.stdout.startswith(f"snapshot {number}: 3 rows"), done.stderr
    assert lut_db("snapshot", "export", "1", str(again), "--database", there).exit_code == 0
    assert again.read_text() == file.read_text()
    assert "unsupported" not in lut_db("rows", TARGET.key, "--status", "measured", "--database", there).stdout
    assert len(lut_db("rows", TARGET.key, "--database", there).stdout.splitlines()) == 4
    assert lut_db("remeasure", TARGET.key, PLAN.key, "--database", there).stdout == "1 measurements enqueued\n"
    told = file.read_text()
    for said, instead, field in (
        ('"latency_ms": 0.125', '"latency_ms": -1', "rows.0.measurement.latency_ms"),
        ('"canary_ms": 0.25', '"canary_ms": 0.26', "canary_ms"),
        ('"heavy_canary_ms": 1.5', '"heavy_canary_ms": 1.6', "heavy_canary_ms"),
    ):
        assert said in told
        file.write_text(told.replace(said, instead, 1))
        done = lut_db("snapshot", "import", str(file), "--database", there)
        assert done.exit_code == 1
        assert field in done.stderr


def test_the_command_explains_what_is_wrong(tmp_path) -> None:
    url = f"sqlite:///{tmp_path / 'nothing.sqlite'}"
    done = lut_db("check", "--database", url)
    assert done.exit_code == 1
    assert f"lut-db upgrade --database {url}" in done.stderr
    assert not (tmp_path / "nothing.sqlite").exists()
    assert lut_db("upgrade", "--database", url).exit_code == 0
    assert lut_db("check", "--database", url).exit_code == 0
    done = lut_db("rows", "0" * 16, "--database", url)
    assert (done.exit_code, done.stdout) == (1, "")
    assert "there is no target" in done.stderr
