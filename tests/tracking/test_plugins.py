"""The plugins of ``mlflow run``."""

import subprocess
import sys


def test_the_plugin_of_mlflow_run_needs_no_mlflow_to_be_imported():
    # MLflow imports its plugins while it is half imported itself; one that needs it then is dropped with a warning.
    check = "import sys, pipeline.tracking.plugins; sys.exit('mlflow' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check], check=False).returncode == 0
