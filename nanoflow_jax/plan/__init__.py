"""A plan is data: its ops (`ops`), rows and order (`plan`), file (`file`), and the ones known to be good (`known`)."""
