"""The latency of the heavy canary to which a target's tables are scaled."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0008"
down_revision = "0007"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("targets", sa.Column("heavy_canary_ms", sa.Double(), nullable=True))


def downgrade() -> None:
    op.drop_column("targets", "heavy_canary_ms")
