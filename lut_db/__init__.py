"""The words that service, agents and searches share, how operators are lowered, and where latencies are kept.

Importing this package imports neither SQLAlchemy nor onnx: `lut_db.storage` and `lut_db.lowering` do, behind
the extras `storage` and `lowering`.
"""

__version__ = "0.1.0"
