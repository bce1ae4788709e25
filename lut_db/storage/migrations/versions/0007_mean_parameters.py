"""How many weights the networks have in which an operator is asked for."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("workloads", sa.Column("mean_parameters", sa.Double(), nullable=True))


def downgrade() -> None:
    op.drop_column("workloads", "mean_parameters")
