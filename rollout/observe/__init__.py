"""How an engine is watched: Prometheus metrics, structured logs, `rollout-top`. Keeps nothing itself."""
