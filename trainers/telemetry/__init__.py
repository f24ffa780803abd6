"""What routers do while a model trains.

`telemetry` (start here: the callback), `routing_statistics` (counts on the device), `routing_figures` (what they mean),
`collapse` (an alarm), `stage_page` (all of it drawn when a stage is done).
"""
