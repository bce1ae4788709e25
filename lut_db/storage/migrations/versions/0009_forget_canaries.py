"""Forgets the canaries' latencies: the canary is another network, and the next lease sets its reference."""

from __future__ import annotations

from alembic import op

revision = "0009"
down_revision = "0008"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.execute("UPDATE targets SET canary_ms = NULL, heavy_canary_ms = NULL")


def downgrade() -> None:
    upgrade()
