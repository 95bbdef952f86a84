"""One public function a flow; the only place that knows Ray and MLflow."""
