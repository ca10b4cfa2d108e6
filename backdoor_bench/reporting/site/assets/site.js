"use strict";
// The leaderboard's sorting, filters and charts. Rows are numbered as in the page; the charts show those that are left.
const rows = JSON.parse(document.getElementById("rows").textContent);
const colours = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#7b5bb5", "#8c6d46", "#5f6b77", "#b8a800"];
const symbols = ["circle", "square", "diamond", "cross", "x", "triangle-up", "star", "pentagon"];

// plotly.js reads a few tags in texts.
const plain = (text) => String(text).replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");
const unique = (values) => [...new Set(values)];
const mean = (values) => values.reduce((sum, value) => sum + value, 0) / values.length;
const shown = (value) => (value === null ? "-" : value.toFixed(2));
const options = { responsive: true, displaylogo: false, displayModeBar: false };
const font = { family: 'system-ui, "Segoe UI", Roboto, "DejaVu Sans", sans-serif', size: 13, color: "#1c2733" };
const narrow = () => window.innerWidth < 760;
// One colour and one symbol a defence, whatever the filters leave.
const defences = unique(rows.map((row) => row.defense)).sort();

// A chart as high as what it holds.
function plot(id, traces, height, layout) {
  document.getElementById(id).style.height = `${height}px`;
  Plotly.react(id, traces, { font, height, ...layout }, options);
}

function tradeoff(kept) {
  const traces = defences.map((name, place) => {
    const here = kept.filter((row) => row.defense === name && row.acc !== null && row.asr !== null);
    return {
      type: "scatter", mode: "markers", name: plain(name),
      x: here.map((row) => row.asr), y: here.map((row) => row.acc),
      marker: { color: colours[place % colours.length], symbol: symbols[Math.floor(place / colours.length + place) % symbols.length], size: 9, opacity: 0.8, line: { width: 1, color: "#fff" } },
      text: here.map((row) => [
        `<b>${plain(row.attack)}, ${plain(row.defense)}</b>`, `${plain(row.dataset)}, ${plain(row.model)}`,
        [row.paper, row.budget, row.settings].filter(Boolean).map(plain).join(" ").slice(0, 120),
        `ACC ${shown(row.acc)}, ASR ${shown(row.asr)}, seeds ${row.n}`,
      ].filter(Boolean).join("<br>")),
      hoverinfo: "text",
    };
  }).filter((trace) => trace.x.length);
  plot("tradeoff", traces, narrow() ? 420 + 14 * traces.length : 520, {
    margin: { l: 50, r: 10, t: 10, b: 45 }, hovermode: "closest", showlegend: true,
    legend: narrow() ? { orientation: "h", y: -0.15 } : { x: 1.01, y: 1 },
    xaxis: { title: { text: "ASR (%), lower is better" }, range: [-3, 103], zeroline: false, gridcolor: "#e5e9ed" },
    yaxis: { title: { text: "ACC (%)" }, range: [-3, 103], zeroline: false, gridcolor: "#e5e9ed" },
  });
}

function heat(kept, metric) {
  const here = kept.filter((row) => row[metric] !== null);
  const attacks = unique(here.map((row) => row.attack)).sort().reverse();
  const methods = unique(here.map((row) => row.isolation)).sort();
  const z = attacks.map((attack) => methods.map((method) => {
    const values = here.filter((row) => row.attack === attack && row.isolation === method).map((row) => row[metric]);
    return values.length ? mean(values) : null;
  }));
  const few = methods.length <= (narrow() ? 5 : 9);
  plot(metric, [{
    type: "heatmap", x: methods.map(plain), y: attacks.map(plain), z, zmin: 0, zmax: 100, colorscale: "Cividis",
    xgap: 1, ygap: 1, hoverongaps: false, hovertemplate: `%{y}, %{x}<br>${metric} %{z:.2f}<extra></extra>`,
    texttemplate: few ? "%{z:.1f}" : "", colorbar: { thickness: 10, title: { text: "%" } },
  }], Math.max(220, 110 + 24 * attacks.length), {
    margin: { l: 10, r: 10, t: 34, b: 10 }, title: { text: metric, font: { size: 14 } },
    xaxis: { type: "category", automargin: true, fixedrange: true }, yaxis: { type: "category", automargin: true, fixedrange: true, ticksuffix: " " },
  });
  return here.length;
}

function cost(kept) {
  const here = kept.filter((row) => Object.keys(row.stages).length);
  const names = unique(here.map((row) => row.defense)).sort().reverse();
  const stages = unique(here.flatMap((row) => Object.keys(row.stages)));
  const traces = stages.map((stage, place) => ({
    type: "bar", orientation: "h", name: plain(stage), y: names.map(plain),
    x: names.map((name) => mean(here.filter((row) => row.defense === name).map((row) => row.stages[stage] || 0)) / 60),
    marker: { color: colours[place % colours.length] }, hovertemplate: "%{y}: %{x:.2f} min<extra>%{fullData.name}</extra>",
  }));
  plot("cost", traces, Math.max(260, 150 + 26 * names.length), {
    barmode: "stack", margin: { l: 10, r: 10, t: 10, b: 45 },
    legend: { orientation: "h", y: 1, yanchor: "bottom", x: 0, traceorder: "normal" },
    xaxis: { title: { text: "minutes" }, gridcolor: "#e5e9ed", fixedrange: true },
    yaxis: { type: "category", automargin: true, fixedrange: true, ticksuffix: " " },
  });
}

// A chart is drawn when it comes into view, and again when the rows have changed.
const charts = {
  tradeoff: (kept) => tradeoff(kept),
  isolation: (kept) => {
    const flagging = heat(kept, "precision") + heat(kept, "recall");
    document.getElementById("isolation").classList.toggle("empty", !flagging);
    document.getElementById("no-isolation").hidden = flagging > 0;
  },
  cost: (kept) => cost(kept),
};
let left = rows.map((row, index) => index);
const visible = new Set();
const drawn = {};
// plotly.js is the largest file by far: it is read when the first chart is due, so that the table is there before.
let plotly = null;
function plotlyLoaded() {
  plotly = plotly || new Promise((resolve, reject) => {
    const script = document.createElement("script");
    script.src = "assets/plotly.js";
    script.onload = resolve;
    script.onerror = reject;
    document.head.append(script);
  });
  return plotly;
}
async function draw() {
  if (![...visible].some((name) => drawn[name] !== left.join())) return;
  await plotlyLoaded();
  for (const name of visible) {
    if (drawn[name] !== left.join()) {
      drawn[name] = left.join();
      charts[name](left.map((index) => rows[index]));
      document.getElementById(name).dataset.drawn = "yes";
    }
  }
}
const watcher = new IntersectionObserver((entries) => {
  entries.forEach((entry) => (entry.isIntersecting ? visible.add(entry.target.id) : visible.delete(entry.target.id)));
  draw();
}, { rootMargin: "200px" });

async function start() {
  const { default: DataTable } = await import(window.dataTablesModule);
  // Numbers of which some are not there: those come last in either order.
  const last = (order) => (a, b) => (a === null ? (b === null ? 0 : 1) : b === null ? -1 : order * (a - b));
  DataTable.type("measured", { order: { pre: (text) => (text === "" ? null : Number(text)), asc: last(1), desc: last(-1) } });
  const selects = [...document.querySelectorAll("select[data-filter]")];
  const table = new DataTable("#runs", {
    order: [[4, "desc"]], columnDefs: [{ type: "measured", targets: [4, 5, 6, 7, 8, 9, 10] }], pageLength: 25, lengthMenu: [25, 100, { label: "all", value: -1 }], autoWidth: false,
    language: { search: "search", lengthMenu: "_MENU_ rows a page", zeroRecords: "no row is left: clear a filter" },
  });
  table.search.fixed("filters", (text, data, index) =>
    selects.every((select) => !select.value || [].concat(rows[index][select.dataset.filter]).includes(select.value.slice(1))));
  const update = () => {
    left = table.rows({ search: "applied" }).indexes().toArray().sort((a, b) => a - b);
    document.getElementById("shown").textContent = `${left.length} of ${rows.length} rows`;
    draw();
  };
  table.on("draw", update);
  selects.forEach((select) => select.addEventListener("change", () => table.draw()));
  document.getElementById("clear").addEventListener("click", () => {
    selects.forEach((select) => { select.value = ""; });
    table.search("").draw();
  });
  document.getElementById("sort").addEventListener("change", (event) => {
    const [column, direction] = event.target.value.split(",");
    table.order([Number(column), direction]).draw();
  });
  update();
  Object.keys(charts).forEach((name) => watcher.observe(document.getElementById(name)));
  document.body.dataset.ready = "yes";
}

start();
