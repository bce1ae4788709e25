"""What failed on one device is tried on another."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("pending", sa.Column("failed_on", sa.String(64), nullable=True))


def downgrade() -> None:
    op.drop_column("pending", "failed_on")
