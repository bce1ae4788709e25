"""The first tables."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "devices",
        sa.Column("name", sa.String(length=64), nullable=False),
        sa.Column("state", sa.String(length=16), nullable=False),
        sa.Column("reason", sa.Text(), nullable=True),
        sa.Column("last_seen", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("name", name=op.f("pk_devices")),
    )
    op.create_table(
        "evidence",
        sa.Column("id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), autoincrement=True, nullable=False),
        sa.Column("definition", sa.JSON(none_as_null=True), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_evidence")),
        sqlite_autoincrement=True,
    )
    op.create_table(
        "plans",
        sa.Column("key", sa.String(length=16), nullable=False),
        sa.Column("definition", sa.JSON(none_as_null=True), nullable=False),
        sa.PrimaryKeyConstraint("key", name=op.f("pk_plans")),
    )
    op.create_table(
        "targets",
        sa.Column("key", sa.String(length=16), nullable=False),
        sa.Column("definition", sa.JSON(none_as_null=True), nullable=False),
        sa.Column("canary_ms", sa.Double(), nullable=True),
        sa.PrimaryKeyConstraint("key", name=op.f("pk_targets")),
    )
    op.create_table(
        "workloads",
        sa.Column("key", sa.String(length=32), nullable=False),
        sa.Column("kind", sa.String(length=32), nullable=False),
        sa.Column("definition", sa.JSON(none_as_null=True), nullable=False),
        sa.PrimaryKeyConstraint("key", name=op.f("pk_workloads")),
    )
    op.create_index(op.f("ix_workloads_kind"), "workloads", ["kind"], unique=False)
    op.create_table(
        "corrections",
        sa.Column("id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), autoincrement=True, nullable=False),
        sa.Column("target", sa.String(length=16), nullable=False),
        sa.Column("plan", sa.String(length=16), nullable=False),
        sa.Column("revision", sa.Integer(), nullable=False),
        sa.Column("definition", sa.JSON(none_as_null=True), nullable=False),
        sa.Column("fitted_at", sa.DateTime(timezone=True), nullable=False),
        sa.ForeignKeyConstraint(["plan"], ["plans.key"], name=op.f("fk_corrections_plan_plans")),
        sa.ForeignKeyConstraint(["target"], ["targets.key"], name=op.f("fk_corrections_target_targets")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_corrections")),
        sa.UniqueConstraint("target", "plan", "revision", name=op.f("uq_corrections_target_plan_revision")),
        sqlite_autoincrement=True,
    )
    op.create_table(
        "device_targets",
        sa.Column("device", sa.String(length=64), nullable=False),
        sa.Column("target", sa.String(length=16), nullable=False),
        sa.Column("position", sa.Integer(), nullable=False),
        sa.ForeignKeyConstraint(["device"], ["devices.name"], name=op.f("fk_device_targets_device_devices")),
        sa.ForeignKeyConstraint(["target"], ["targets.key"], name=op.f("fk_device_targets_target_targets")),
        sa.PrimaryKeyConstraint("device", "target", name=op.f("pk_device_targets")),
    )
    op.create_index(op.f("ix_device_targets_target"), "device_targets", ["target"], unique=False)
    op.create_table(
        "leases",
        sa.Column("id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), autoincrement=True, nullable=False),
        sa.Column("device", sa.String(length=64), nullable=False),
        sa.Column("target", sa.String(length=16), nullable=False),
        sa.Column("plan", sa.String(length=16), nullable=False),
        sa.Column("state", sa.String(length=16), nullable=False),
        sa.Column("granted_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("deadline", sa.DateTime(timezone=True), nullable=False),
        sa.Column("rows", sa.Integer(), nullable=False),
        sa.Column("requeued", sa.Integer(), nullable=False),
        sa.ForeignKeyConstraint(["device"], ["devices.name"], name=op.f("fk_leases_device_devices")),
        sa.ForeignKeyConstraint(["plan"], ["plans.key"], name=op.f("fk_leases_plan_plans")),
        sa.ForeignKeyConstraint(["target"], ["targets.key"], name=op.f("fk_leases_target_targets")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_leases")),
        sqlite_autoincrement=True,
    )
    op.create_index("ix_leases_state_deadline", "leases", ["state", "deadline"], unique=False)
    op.create_index(
        "uq_leases_device_active",
        "leases",
        ["device"],
        unique=True,
        sqlite_where=sa.text("state = 'active'"),
        postgresql_where=sa.text("state = 'active'"),
    )
    op.create_table(
        "calibrations",
        sa.Column("id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), autoincrement=True, nullable=False),
        sa.Column("key", sa.String(length=32), nullable=False),
        sa.Column("target", sa.String(length=16), nullable=False),
        sa.Column("plan", sa.String(length=16), nullable=False),
        sa.Column("whole", sa.String(length=16), nullable=False),
        sa.Column("networks", sa.JSON(none_as_null=True), nullable=False),
        sa.Column("operators", sa.JSON(none_as_null=True), nullable=False),
        sa.Column("state", sa.String(length=16), nullable=False),
        sa.Column("message", sa.Text(), nullable=True),
        sa.Column("correction", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=True),
        sa.Column("left_out", sa.JSON(none_as_null=True), nullable=True),
        sa.Column("asked_at", sa.DateTime(timezone=True), nullable=False),
        sa.ForeignKeyConstraint(
            ["correction"], ["corrections.id"], name=op.f("fk_calibrations_correction_corrections")
        ),
        sa.ForeignKeyConstraint(["plan"], ["plans.key"], name=op.f("fk_calibrations_plan_plans")),
        sa.ForeignKeyConstraint(["target"], ["targets.key"], name=op.f("fk_calibrations_target_targets")),
        sa.ForeignKeyConstraint(["whole"], ["plans.key"], name=op.f("fk_calibrations_whole_plans")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_calibrations")),
        sa.UniqueConstraint("key", name=op.f("uq_calibrations_key")),
        sqlite_autoincrement=True,
    )
    op.create_index(op.f("ix_calibrations_state"), "calibrations", ["state"], unique=False)
    op.create_table(
        "pending",
        sa.Column("id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), autoincrement=True, nullable=False),
        sa.Column("target", sa.String(length=16), nullable=False),
        sa.Column("plan", sa.String(length=16), nullable=False),
        sa.Column("workload", sa.String(length=32), nullable=False),
        sa.Column("lease", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=True),
        sa.Column("attempts", sa.Integer(), nullable=False),
        sa.Column("not_before", sa.DateTime(timezone=True), nullable=False),
        sa.Column("enqueued_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("last_failure", sa.JSON(none_as_null=True), nullable=True),
        sa.ForeignKeyConstraint(["lease"], ["leases.id"], name=op.f("fk_pending_lease_leases")),
        sa.ForeignKeyConstraint(["plan"], ["plans.key"], name=op.f("fk_pending_plan_plans")),
        sa.ForeignKeyConstraint(["target"], ["targets.key"], name=op.f("fk_pending_target_targets")),
        sa.ForeignKeyConstraint(["workload"], ["workloads.key"], name=op.f("fk_pending_workload_workloads")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_pending")),
        sa.UniqueConstraint("target", "plan", "workload", name=op.f("uq_pending_target_plan_workload")),
        sqlite_autoincrement=True,
    )
    op.create_index(op.f("ix_pending_lease"), "pending", ["lease"], unique=False)
    op.create_index("ix_pending_target_lease_not_before", "pending", ["target", "lease", "not_before"], unique=False)
    op.create_table(
        "pins",
        sa.Column("id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), autoincrement=True, nullable=False),
        sa.Column("target", sa.String(length=16), nullable=False),
        sa.Column("plan", sa.String(length=16), nullable=False),
        sa.Column("correction", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=True),
        sa.Column("correction_frozen", sa.Boolean(), nullable=False),
        sa.Column("snapshot", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=True),
        sa.Column("opened_at", sa.DateTime(timezone=True), nullable=False),
        sa.ForeignKeyConstraint(["correction"], ["corrections.id"], name=op.f("fk_pins_correction_corrections")),
        sa.ForeignKeyConstraint(["plan"], ["plans.key"], name=op.f("fk_pins_plan_plans")),
        sa.ForeignKeyConstraint(["target"], ["targets.key"], name=op.f("fk_pins_target_targets")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_pins")),
        sa.UniqueConstraint("snapshot", name=op.f("uq_pins_snapshot")),
        sqlite_autoincrement=True,
    )
    op.create_table(
        "rows",
        sa.Column("id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), autoincrement=True, nullable=False),
        sa.Column("target", sa.String(length=16), nullable=False),
        sa.Column("plan", sa.String(length=16), nullable=False),
        sa.Column("workload", sa.String(length=32), nullable=False),
        sa.Column("revision", sa.Integer(), nullable=False),
        sa.Column("status", sa.String(length=16), nullable=False),
        sa.Column("latency_ms", sa.Double(), nullable=True),
        sa.Column("half_width_ms", sa.Double(), nullable=True),
        sa.Column("spread", sa.Double(), nullable=True),
        sa.Column("stop", sa.String(length=16), nullable=True),
        sa.Column("samples", sa.JSON(none_as_null=True), nullable=False),
        sa.Column("failure", sa.JSON(none_as_null=True), nullable=True),
        sa.Column("evidence", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=True),
        sa.Column("device", sa.String(length=64), nullable=False),
        sa.Column("lease", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=True),
        sa.Column("measured_at", sa.DateTime(timezone=True), nullable=False),
        sa.ForeignKeyConstraint(["evidence"], ["evidence.id"], name=op.f("fk_rows_evidence_evidence")),
        sa.ForeignKeyConstraint(["lease"], ["leases.id"], name=op.f("fk_rows_lease_leases")),
        sa.ForeignKeyConstraint(["plan"], ["plans.key"], name=op.f("fk_rows_plan_plans")),
        sa.ForeignKeyConstraint(["target"], ["targets.key"], name=op.f("fk_rows_target_targets")),
        sa.ForeignKeyConstraint(["workload"], ["workloads.key"], name=op.f("fk_rows_workload_workloads")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_rows")),
        sa.UniqueConstraint(
            "target", "plan", "workload", "revision", name=op.f("uq_rows_target_plan_workload_revision")
        ),
        sqlite_autoincrement=True,
    )
    op.create_table(
        "pin_rows",
        sa.Column("pin", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=False),
        sa.Column("workload", sa.String(length=32), nullable=False),
        sa.Column("row", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=False),
        sa.ForeignKeyConstraint(["pin"], ["pins.id"], name=op.f("fk_pin_rows_pin_pins")),
        sa.ForeignKeyConstraint(["row"], ["rows.id"], name=op.f("fk_pin_rows_row_rows")),
        sa.ForeignKeyConstraint(["workload"], ["workloads.key"], name=op.f("fk_pin_rows_workload_workloads")),
        sa.PrimaryKeyConstraint("pin", "workload", name=op.f("pk_pin_rows")),
    )


def downgrade() -> None:
    op.drop_table("pin_rows")
    op.drop_table("rows")
    op.drop_table("pins")
    op.drop_index("ix_pending_target_lease_not_before", table_name="pending")
    op.drop_index(op.f("ix_pending_lease"), table_name="pending")
    op.drop_table("pending")
    op.drop_index(op.f("ix_calibrations_state"), table_name="calibrations")
    op.drop_table("calibrations")
    op.drop_index(
        "uq_leases_device_active",
        table_name="leases",
        sqlite_where=sa.text("state = 'active'"),
        postgresql_where=sa.text("state = 'active'"),
    )
    op.drop_index("ix_leases_state_deadline", table_name="leases")
    op.drop_table("leases")
    op.drop_index(op.f("ix_device_targets_target"), table_name="device_targets")
    op.drop_table("device_targets")
    op.drop_table("corrections")
    op.drop_index(op.f("ix_workloads_kind"), table_name="workloads")
    op.drop_table("workloads")
    op.drop_table("targets")
    op.drop_table("plans")
    op.drop_table("evidence")
    op.drop_table("devices")
