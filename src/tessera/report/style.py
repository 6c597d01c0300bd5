"""The page's style sheet."""

__all__ = ["CSS"]

CSS = """
:root{--page:#fff;--text:#16191d;--muted:#5b646e;--rule:#d5dade;--faint:#e9ecef;--soft:#f5f7f8;
--hatch:#cfd5da;color-scheme:light dark}
.ink{--c:var(--l)}
@media screen and (prefers-color-scheme:dark){
:root{--page:#121518;--text:#f1f3f5;--muted:#a3acb5;--rule:#3a424a;--faint:#262c32;--soft:#1a1f24;
--hatch:#3b434b}
.ink{--c:var(--d)}
}
*{box-sizing:border-box}
html{background:var(--page);color:var(--text);-webkit-text-size-adjust:100%}
body{max-width:52rem;margin:0 auto;padding:3.5rem 1.5rem 5rem;
font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif}
h1{font-size:1.75rem;line-height:1.28;font-weight:650;letter-spacing:-.012em;margin:0;
text-wrap:pretty;overflow-wrap:anywhere}
h2{font-size:1.125rem;line-height:1.3;font-weight:650;margin:0 0 .35rem}
h3{font-size:.9375rem;font-weight:600;margin:0 0 .6rem;overflow-wrap:anywhere}
section{margin-top:3.25rem}
p{margin:.35rem 0 0;max-width:44rem;text-wrap:pretty}
.lede{margin-top:.9rem;color:var(--muted);overflow-wrap:anywhere}
.note{color:var(--muted);font-size:.9375rem}
.scroll{overflow-x:auto;margin-top:1.1rem}
table{border-collapse:collapse;width:100%;font-size:.9375rem;font-variant-numeric:tabular-nums}
th,td{text-align:left;vertical-align:top;padding:.45rem 0 .45rem 1.1rem;font-weight:400}
th:first-child,td:first-child{padding-left:0}
thead th{color:var(--muted);font-size:.8125rem;line-height:1.35;border-bottom:1px solid var(--text);
vertical-align:bottom}
thead small{display:block;font-size:inherit}
tbody th,tbody td{border-bottom:1px solid var(--faint)}
tbody tr:last-child>*{border-bottom-color:var(--rule)}
.figures th:not(:first-child),.figures td{text-align:right;white-space:nowrap}
.figures th:not(:first-child){width:14%}
.figures tbody th{overflow-wrap:anywhere;min-width:5.5rem}
.figures .main>*{font-weight:650}
.settings tbody th{color:var(--muted);white-space:nowrap}
.settings td{overflow-wrap:anywhere;min-width:5rem}
dl{display:grid;grid-template-columns:auto 1fr;gap:.3rem 1.1rem;margin:1.1rem 0 0;
font-size:.875rem;line-height:1.5;color:var(--muted)}
dt{color:var(--text)}
dd{margin:0;max-width:40rem}
figure{margin:1.4rem 0 0;min-width:0}
figcaption{margin-top:.4rem;font-size:.875rem;color:var(--muted);max-width:42rem}
.maps{display:flex;flex-wrap:wrap;gap:1.8rem 3rem;margin-top:1.4rem}
.maps figure{margin:0;max-width:100%}
svg{display:block;max-width:100%;height:auto;font-family:inherit;font-variant-numeric:tabular-nums;
fill:var(--text)}
svg .axis,svg .muted{fill:var(--muted)}
.heat{font-size:12.5px}
.heat text.ink{fill:var(--c)}
.cell{fill:var(--c)}
.empty{fill:none;stroke:var(--rule)}
.ahead{fill:url(#unlearned)}
.heat text.muted{paint-order:stroke;stroke:var(--page);stroke-width:4px;stroke-linejoin:round}
.hatch{stroke:var(--hatch);stroke-width:1.5}
stop.ink{stop-color:var(--c)}
.chart{font-size:12.5px}
.grid{stroke:var(--faint)}
.axis-line{stroke:var(--muted)}
.boundary{stroke:var(--muted);stroke-dasharray:1 4;stroke-linecap:round;stroke-width:1.2;
opacity:.7}
.line{fill:none;stroke:var(--c);stroke-linejoin:round;stroke-linecap:butt}
.line.thin{stroke-width:1.6}
.line.bold{stroke-width:3.2}
.line.level{stroke-width:1.6}
.dot{fill:var(--c)}
.leader{fill:none;stroke:var(--c);stroke-width:1;opacity:.65}
.label.bold{font-weight:650}
.narrow{display:none}
pre{margin:1.1rem 0 0;padding:.8rem 1rem;background:var(--soft);border:1px solid var(--faint);
border-radius:4px;white-space:pre-wrap;overflow-wrap:anywhere}
.word{display:inline-block;max-width:100%}
code{font:.875rem/1.5 ui-monospace,SFMono-Regular,Menlo,Consolas,"Liberation Mono",monospace;
}
td code{font-size:.8125rem;overflow-wrap:anywhere}
@media screen and (max-width:46rem){
body{padding:2rem 1rem 3rem}
h1{font-size:1.375rem}
section{margin-top:2.5rem}
th,td{padding-left:.6rem}
.figures{font-size:.8125rem}
.figures thead th{font-size:.75rem}
.figures tbody th{min-width:4.2rem}
dl{grid-template-columns:1fr;gap:0}
dd{margin-bottom:.5rem}
.wide{display:none}
.narrow{display:block}
}
@media print{
@page{margin:18mm}
body{padding:0;max-width:none;font-size:10.5pt}
figure,tr,pre,dl{break-inside:avoid}
h2,h3,.note{break-after:avoid}
.scroll{overflow:visible}
svg{min-width:0!important}
section{margin-top:2rem}
}
"""
