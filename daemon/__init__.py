"""The meter daemon: sensors, meter, attribution, ledger, settlement, audit, metrics and API.

Imports no sibling (`proxy`, `bench`, `rating`); arrows point inward: ``rating -> bench -> daemon <- proxy``.
"""
