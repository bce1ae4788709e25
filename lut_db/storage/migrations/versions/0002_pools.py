"""Several devices of one target: reference leases, who has joined, refusals in a row; leases that arrived."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("devices", sa.Column("refusals", sa.Integer(), server_default="0", nullable=False))
    op.add_column("device_targets", sa.Column("joined", sa.Boolean(), server_default=sa.false(), nullable=False))
    op.add_column("device_targets", sa.Column("agreement", sa.Double(), nullable=True))
    op.add_column("leases", sa.Column("taken", sa.Boolean(), server_default=sa.false(), nullable=False))
    op.add_column("leases", sa.Column("reference", sa.JSON(none_as_null=True), nullable=True))
    # Whoever measured before the question was asked has joined.
    op.execute(sa.text("UPDATE device_targets SET joined = true"))


def downgrade() -> None:
    op.drop_column("leases", "reference")
    op.drop_column("leases", "taken")
    op.drop_column("device_targets", "agreement")
    op.drop_column("device_targets", "joined")
    op.drop_column("devices", "refusals")
