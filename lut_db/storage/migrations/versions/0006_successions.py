"""Which operators follow which in the networks that are asked for, and which add what others made."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "successions",
        sa.Column("before", sa.String(32), nullable=False),
        sa.Column("after", sa.String(32), nullable=False),
        sa.Column("shortcut", sa.Boolean(), nullable=False),
        sa.ForeignKeyConstraint(["before"], ["workloads.key"], name="fk_successions_before_workloads"),
        sa.ForeignKeyConstraint(["after"], ["workloads.key"], name="fk_successions_after_workloads"),
        sa.PrimaryKeyConstraint("before", "after", "shortcut", name="pk_successions"),
    )
    op.create_index("ix_successions_after", "successions", ["after"])


def downgrade() -> None:
    op.drop_index("ix_successions_after", table_name="successions")
    op.drop_table("successions")
