"""Energy beside latency, where a device counts it."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("rows", sa.Column("energy_j", sa.Double(), nullable=True))


def downgrade() -> None:
    op.drop_column("rows", "energy_j")
