"""A plan is data: its ops (`ops`), its file (`plan`, `write`), and the ones known to be good (`known`)."""
