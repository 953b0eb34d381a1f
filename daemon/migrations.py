"""The ledger's schema, one named migration a change, each applied once in a transaction of its own.

Energies are INTEGER µJ, times INTEGER ns of ledger time, NULL means unknown. Every table that measures carries host or
GPU, epoch and source. What a day costs with 8 GPUs and 10,000 queries an hour of some 4 s and 100 chunks each
(measured by `python tests/benchmarks/ledger_size.py`, which also prints the CPU: 0.6 % of a core):

=================  ===========================================================  =====================  ===============
table              one row is                                                   a day                  kept
=================  ===========================================================  =====================  ===============
windows            what one GPU's counter said about about 1 s, with its shape  0.69 million, 530 MB   shape 1 day,
                                                                                                       row 7 days
settlements        how that window was divided                                  0.69 million, 38 MB    7 days
unattributed       energy of a window that belongs to nobody, by reason         few                    7 days
charges            the part of a window booked to one query                     1.2 million, 50 MB     7 days
queries            one request (273 bytes: 10 million are 2.7 GB)               0.24 million, 66 MB    400 days
timelines          times of streamed chunks                                     empties itself         until settled
closings           a closed hour of a GPU: totals, row count, chained hash      192                    for ever
daily_energy       a day's energy by GPU, account, tenant, model                hundreds               for ever
daily_queries      a day's queries by tenant, model, task, status               hundreds               for ever
runs, run_samples  a bench run and its samples                                  as many as are run     for ever
ratings, events    stars given; what happened to the meter                      few                    for ever
=================  ===========================================================  =====================  ===============
"""

from .ledger_sqlite import Database, Migrations

migrations = Migrations("energyd")

_V1 = """
CREATE TABLE hosts (
    host_id TEXT PRIMARY KEY, hostname TEXT NOT NULL, first_seen_ns INTEGER NOT NULL
) STRICT;
CREATE TABLE boots (
    host_id TEXT NOT NULL REFERENCES hosts, boot_id TEXT NOT NULL,
    offset_ns INTEGER NOT NULL, first_seen_ns INTEGER NOT NULL,
    PRIMARY KEY (host_id, boot_id)
) STRICT, WITHOUT ROWID;
CREATE TABLE gpus (
    gpu_id INTEGER PRIMARY KEY, host_id TEXT NOT NULL REFERENCES hosts, uuid TEXT NOT NULL,
    gpu_index INTEGER NOT NULL, name TEXT NOT NULL, driver TEXT NOT NULL, source TEXT NOT NULL,
    power_limit_mw INTEGER, scope TEXT NOT NULL DEFAULT 'gpu', first_seen_ns INTEGER NOT NULL,
    UNIQUE (host_id, uuid)
) STRICT;
CREATE TABLE epochs (
    gpu_id INTEGER NOT NULL REFERENCES gpus, epoch INTEGER NOT NULL, boot_id TEXT NOT NULL,
    start_ns INTEGER NOT NULL, first_counter_mj INTEGER NOT NULL, reason TEXT NOT NULL,
    PRIMARY KEY (gpu_id, epoch)
) STRICT, WITHOUT ROWID;
CREATE TABLE windows (
    gpu_id INTEGER NOT NULL, epoch INTEGER NOT NULL, seq INTEGER NOT NULL,
    start_ns INTEGER NOT NULL, end_ns INTEGER NOT NULL CHECK (end_ns > start_ns),
    counter_start_mj INTEGER NOT NULL, counter_end_mj INTEGER NOT NULL,
    energy_uj INTEGER CHECK (energy_uj >= 0), u_uj INTEGER NOT NULL CHECK (u_uj >= 0),
    kind TEXT NOT NULL CHECK (kind IN ('metered', 'outage', 'reset', 'gap')), source TEXT NOT NULL, shape BLOB,
    PRIMARY KEY (gpu_id, epoch, seq),
    FOREIGN KEY (gpu_id, epoch) REFERENCES epochs,
    CHECK ((energy_uj IS NULL) = (kind = 'gap')),
    CHECK (energy_uj IS NULL OR energy_uj = (counter_end_mj - counter_start_mj) * 1000)
) STRICT, WITHOUT ROWID;
CREATE INDEX windows_by_time ON windows (gpu_id, end_ns);
CREATE INDEX windows_with_shape ON windows (end_ns) WHERE shape IS NOT NULL;
CREATE TABLE settlements (
    gpu_id INTEGER NOT NULL, epoch INTEGER NOT NULL, seq INTEGER NOT NULL,
    energy_uj INTEGER NOT NULL, active_uj INTEGER NOT NULL CHECK (active_uj >= 0),
    standing_uj INTEGER NOT NULL CHECK (standing_uj >= 0), idle_uj INTEGER NOT NULL CHECK (idle_uj >= 0),
    unattributed_uj INTEGER NOT NULL CHECK (unattributed_uj >= 0),
    charges INTEGER NOT NULL, policy TEXT NOT NULL, coefficients_version INTEGER, idle_floor_mw INTEGER,
    settled_ns INTEGER NOT NULL,
    PRIMARY KEY (gpu_id, epoch, seq),
    FOREIGN KEY (gpu_id, epoch, seq) REFERENCES windows,
    CHECK (active_uj + standing_uj + idle_uj + unattributed_uj = energy_uj)
) STRICT, WITHOUT ROWID;
CREATE TABLE unattributed (
    gpu_id INTEGER NOT NULL, epoch INTEGER NOT NULL, seq INTEGER NOT NULL, reason TEXT NOT NULL,
    energy_uj INTEGER NOT NULL CHECK (energy_uj > 0),
    PRIMARY KEY (gpu_id, epoch, seq, reason),
    FOREIGN KEY (gpu_id, epoch, seq) REFERENCES settlements ON DELETE CASCADE
) STRICT, WITHOUT ROWID;
CREATE TABLE models (model_id INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE) STRICT;
CREATE TABLE tenants (tenant_id INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE) STRICT;
CREATE TABLE tasks (task_id INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE) STRICT;
CREATE TABLE queries (
    query_no INTEGER PRIMARY KEY, query_id TEXT NOT NULL UNIQUE, host_id TEXT NOT NULL, worker TEXT, server TEXT,
    tenant_id INTEGER REFERENCES tenants, model_id INTEGER REFERENCES models, task_id INTEGER REFERENCES tasks,
    requested TEXT, served TEXT, stream INTEGER,
    started_ns INTEGER NOT NULL, first_byte_ns INTEGER, ended_ns INTEGER,
    prompt_tokens INTEGER CHECK (prompt_tokens >= 0), completion_tokens INTEGER CHECK (completion_tokens >= 0),
    usage_source TEXT NOT NULL DEFAULT 'absent', chunks INTEGER NOT NULL DEFAULT 0, upload_bytes INTEGER,
    status TEXT NOT NULL, http_status INTEGER,
    active_uj INTEGER CHECK (active_uj >= 0), standing_uj INTEGER CHECK (standing_uj >= 0),
    closed_active_uj INTEGER NOT NULL DEFAULT 0, closed_standing_uj INTEGER NOT NULL DEFAULT 0,
    spread_uj INTEGER NOT NULL DEFAULT 0, rel_u REAL, source TEXT, final INTEGER NOT NULL DEFAULT 0,
    CHECK ((active_uj IS NULL) = (standing_uj IS NULL))
) STRICT;
CREATE INDEX queries_by_time ON queries (started_ns);
CREATE INDEX queries_not_final ON queries (final) WHERE final = 0;
CREATE INDEX queries_by_model ON queries (model_id, started_ns);
CREATE TABLE charges (
    gpu_id INTEGER NOT NULL, epoch INTEGER NOT NULL, seq INTEGER NOT NULL, query_no INTEGER NOT NULL REFERENCES queries,
    active_uj INTEGER NOT NULL CHECK (active_uj >= 0), standing_uj INTEGER NOT NULL CHECK (standing_uj >= 0),
    PRIMARY KEY (gpu_id, epoch, seq, query_no),
    FOREIGN KEY (gpu_id, epoch, seq) REFERENCES settlements
) STRICT, WITHOUT ROWID;
CREATE INDEX charges_by_query ON charges (query_no);
CREATE TABLE timelines (
    query_no INTEGER NOT NULL REFERENCES queries, part INTEGER NOT NULL, chunks BLOB NOT NULL,
    PRIMARY KEY (query_no, part)
) STRICT, WITHOUT ROWID;
CREATE TABLE workers (
    worker TEXT PRIMARY KEY, host_id TEXT NOT NULL, boot_id TEXT NOT NULL, offset_ns INTEGER NOT NULL,
    pid INTEGER NOT NULL, spool TEXT NOT NULL, servers TEXT NOT NULL,
    acked_seq INTEGER NOT NULL DEFAULT 0, watermark_ns INTEGER NOT NULL DEFAULT 0, dropped INTEGER NOT NULL DEFAULT 0,
    gone INTEGER NOT NULL DEFAULT 0
) STRICT;
CREATE TABLE coefficients (
    version INTEGER PRIMARY KEY, gpu_id INTEGER NOT NULL REFERENCES gpus, created_ns INTEGER NOT NULL, theta TEXT NOT NULL
) STRICT;
CREATE TABLE closings (
    gpu_id INTEGER NOT NULL, hour_ns INTEGER NOT NULL, windows INTEGER NOT NULL, energy_uj INTEGER NOT NULL,
    active_uj INTEGER NOT NULL, standing_uj INTEGER NOT NULL, idle_uj INTEGER NOT NULL, unattributed_uj INTEGER NOT NULL,
    detail TEXT NOT NULL, previous_hash TEXT NOT NULL, hash TEXT NOT NULL,
    PRIMARY KEY (gpu_id, hour_ns),
    CHECK (active_uj + standing_uj + idle_uj + unattributed_uj = energy_uj)
) STRICT, WITHOUT ROWID;
CREATE TABLE daily_energy (
    day INTEGER NOT NULL, gpu_id INTEGER NOT NULL, account TEXT NOT NULL, tenant_id INTEGER NOT NULL,
    model_id INTEGER NOT NULL, energy_uj INTEGER NOT NULL CHECK (energy_uj >= 0),
    PRIMARY KEY (day, gpu_id, account, tenant_id, model_id)
) STRICT, WITHOUT ROWID;
CREATE TABLE daily_queries (
    day INTEGER NOT NULL, tenant_id INTEGER NOT NULL, model_id INTEGER NOT NULL, task_id INTEGER NOT NULL,
    status TEXT NOT NULL, http_status INTEGER NOT NULL, queries INTEGER NOT NULL, prompt_tokens INTEGER NOT NULL,
    completion_tokens INTEGER NOT NULL, tokens_unknown INTEGER NOT NULL, energy_unknown INTEGER NOT NULL,
    active_uj INTEGER NOT NULL, standing_uj INTEGER NOT NULL,
    PRIMARY KEY (day, tenant_id, model_id, task_id, status, http_status)
) STRICT, WITHOUT ROWID;
CREATE TABLE runs (
    run_id TEXT PRIMARY KEY, host_id TEXT NOT NULL, task_id INTEGER NOT NULL REFERENCES tasks,
    model_id INTEGER NOT NULL REFERENCES models, batch_size INTEGER NOT NULL, url TEXT NOT NULL, status TEXT NOT NULL,
    started_ns INTEGER NOT NULL, measured_start_ns INTEGER, measured_end_ns INTEGER,
    provenance TEXT NOT NULL, summary TEXT NOT NULL, released INTEGER NOT NULL DEFAULT 0
) STRICT;
CREATE TABLE run_samples (
    run_id TEXT NOT NULL REFERENCES runs, phase TEXT NOT NULL, idx INTEGER NOT NULL, query_id TEXT,
    start_ns INTEGER NOT NULL, end_ns INTEGER NOT NULL, ok INTEGER NOT NULL, http_status INTEGER, error TEXT,
    PRIMARY KEY (run_id, phase, idx)
) STRICT, WITHOUT ROWID;
CREATE INDEX run_samples_by_query ON run_samples (query_id);
CREATE TABLE ratings (
    rating_id TEXT NOT NULL, created_ns INTEGER NOT NULL, edition TEXT NOT NULL, method TEXT NOT NULL,
    basis TEXT NOT NULL, rows TEXT NOT NULL, PRIMARY KEY (rating_id)
) STRICT;
CREATE TABLE events (
    event_id INTEGER PRIMARY KEY, at_ns INTEGER NOT NULL, host_id TEXT NOT NULL, gpu_id INTEGER, kind TEXT NOT NULL,
    detail TEXT NOT NULL
) STRICT;
"""


@migrations()
def v1_spine(db: Database) -> None:
    """Everything of 0.1.0; statements run one by one so that the migration's transaction holds."""
    for statement in _V1.split(";\n"):
        if statement.strip():
            db.execute(statement)
