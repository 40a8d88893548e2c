"""What `ssl-ae doctor` looks at: nothing here imports torch, mlflow or a plugin before the check that needs it."""

from ssl_ae.doctor.checks import Finding, broken_ones, examine, report_of

__all__ = ["Finding", "broken_ones", "examine", "report_of"]
