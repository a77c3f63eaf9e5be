// The charts of an audit, as Plotly lays them out, with its own buttons to zoom and to save.

async function liveAudit({ data, layout }) {
  await unpack("plotly");
  Plotly.newPlot("charts", data, layout, { displaylogo: false, responsive: true });
}

liveAudit(JSON.parse(document.getElementById("data").textContent));
